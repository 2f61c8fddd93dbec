"""Lists the configs that come with jaxllm, by the names that `pretrain` takes; with a name, prints that file."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

from interrupts import interruptible

_ROOT = Path(__file__).parent.parent
_INSTALLED = _ROOT / "jaxllm" / "configs"  # by a wheel; in a clone they are next to the package
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _ROOT / "configs"


@interruptible
def main() -> int:
    """Prints a line for each config, or the text of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="the config to print, e.g. llama_tiny")
    name = parser.parse_args().name
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.yaml"))}
    if name is None:
        for each, text in texts.items():
            print(f"{each:<{max(map(len, texts))}}  {text.splitlines()[0].removeprefix('# Purpose: ')}")
        return 0
    if name not in texts:
        return unknown("config", name, texts)
    print(texts[name], end="")
    return 0


def unknown(kind: str, name: str, known: Iterable[str]) -> int:
    """Reports a name that does not exist, with the nearest that does; the status of such an error."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    print(f"error: unknown {kind} {name!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
