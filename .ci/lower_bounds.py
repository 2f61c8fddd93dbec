"""Prints the lower bounds of pyproject's dependencies as constraints of pip: the oldest versions that we support."""

import re
import tomllib
from pathlib import Path


def lower_bounds() -> list[str]:
    """`name==version` for each dependency."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.sub(r"(\[\w+\])?>=", "==", each) for each in project["dependencies"]]


if __name__ == "__main__":
    print("\n".join(lower_bounds()))
