"""docs/ is true: links lead somewhere, commands parse, messages are the code's, no public name is missing."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import jaxllm
from jaxllm.config.file import ConfigError, describe_keys, load_config
from scripts.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
LISTED = re.findall(r"^::: (\S+)$", "\n".join(TEXTS.values()), flags=re.M)
SCRIPTS = {command.script for command in COMMANDS.values()}
KEYS = {key for rows in describe_keys().values() for key, *_ in rows}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as mkdocs and GitHub make them, and of its API entries."""
    titles = re.findall(r"^#+ (.+)$", without_code(TEXTS[page]), flags=re.M)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}
    return slugs | set(re.findall(r"^::: (\S+)$", TEXTS[page], flags=re.M))


def links() -> list[tuple[Path, str]]:
    found = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[page]))]
    return [(page, target) for page, target in found if not target.startswith("http")]


def test_every_link_and_anchor_leads_somewhere() -> None:
    assert len(links()) > 80
    for page, target in links():
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} -> {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} -> {target}"


def test_pages_of_the_site_link_to_pages_of_the_site() -> None:
    for page, target in links():
        assert page not in DOCS or not target.startswith(".."), f"{page.name} -> {target} is not part of the site"


def test_every_page_is_in_the_navigation_and_can_be_reached_from_the_first() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = [item for section in site["nav"] for part in section.values() for item in [part] if part]
    names = [name for part in entries for name in (part if isinstance(part, list) else [part])]
    files = [name if isinstance(name, str) else next(iter(name.values())) for name in names]
    assert sorted(files) == [page.name for page in DOCS]
    first = {target.partition("#")[0] for page, target in links() if page.name == "index.md"}
    assert not {page.name for page in DOCS} - first - {"index.md", "glossary.md", "design.md", "api_modules.md"}


def resolve(name: str) -> Any:
    """The module, function or class of a dotted name."""
    value: Any = jaxllm
    path = "jaxllm"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if inspect.ismodule(value) and part not in jaxllm.__all__ and value.__file__.endswith("__init__.py"):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(path)
        value = getattr(value, part)
    return value


def test_the_api_has_every_public_name_once_and_each_is_documented() -> None:
    assert len(LISTED) == len(set(LISTED))
    short = {name for name in LISTED if name.count(".") == 1} - {"jaxllm.study"}
    assert short == {f"jaxllm.{name}" for name in jaxllm.__all__}
    for name in LISTED:
        assert inspect.getdoc(resolve(name)), f"{name} has no docstring"


def public_functions() -> list[tuple[str, object]]:
    """The functions and classes of the listed names, those of a listed module among them."""
    found = {}
    for name in LISTED:
        value = resolve(name)
        members = vars(value).items() if inspect.ismodule(value) else [(name, value)]
        for label, each in members:
            own = not inspect.ismodule(value) or getattr(each, "__module__", None) == name
            if own and not label.startswith("_") and (inspect.isfunction(each) or inspect.isclass(each)):
                found[f"{each.__module__}.{each.__qualname__}"] = each
    return sorted(found.items())


def test_every_function_and_class_of_the_api_is_documented_in_its_own_words() -> None:
    assert len(public_functions()) > 100
    for name, value in public_functions():
        text = value.__doc__ or ""
        assert text and not text.startswith(f"{name.rsplit('.', 1)[1]}("), f"{name} has no docstring"


def test_every_module_that_a_page_imports_from_is_in_the_api() -> None:
    """So is every dotted name of jaxllm that its text has, which must exist."""
    for page in DOCS:
        for module in re.findall(r"^from (jaxllm\.[\w.]+) import", TEXTS[page], flags=re.M):
            covered = any(name == module or name.startswith(f"{module}.") for name in LISTED)
            assert covered or module in ("jaxllm.config", "jaxllm.generation", "jaxllm.models"), (
                f"{page.name}: {module}"
            )
        for name in re.findall(r"`(jaxllm(?:\.\w+)+)", without_code(TEXTS[page])):
            resolve(name)


def commands() -> list[tuple[str, list[str]]]:
    """Each command of a shell block of these pages, as its words."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", TEXTS[page], flags=re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\s\|\s", line):
                    words = shlex.split(part, comments=True)
                    start = next((i for i, word in enumerate(words) if word in ("jaxllm", "python", "bash")), None)
                    if start is not None:
                        found.append((page.name, words[start:]))
    return found


class Parsed(Exception):
    """Ends a program once its arguments are parsed."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """A function that runs a script as far as its arguments, and returns them."""
    parse_known = argparse.ArgumentParser.parse_known_args
    parse_intermixed = argparse.ArgumentParser.parse_known_intermixed_args

    def stop(arguments: argparse.Namespace, extras: list[str]) -> None:
        assert not extras, extras
        raise Parsed(arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: stop(*parse_known(self)))
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_known_intermixed_args", lambda self, *_: stop(*parse_intermixed(self))
    )

    def run(script: str, words: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [script, *words])
        # parse_known_intermixed_args calls parse_known_args, not parse_args.
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(script).main()
        return parsed.value.args[0]

    return run


def check_settings(arguments: argparse.Namespace) -> None:
    """Loads the config with its settings where it exists; else looks their names up."""
    overrides = getattr(arguments, "overrides", [])
    config = getattr(arguments, "config", None)
    if config and config != "CONFIG" and not config.startswith("runs/"):
        load_config(ROOT / config if "/" in config else config, overrides)
        return
    for override in overrides:
        key = override.partition("=")[0]
        assert key in KEYS or key.startswith("data.validation."), override


def test_every_command_is_one_that_its_program_takes(parse) -> None:
    checked = 0
    for page, words in commands():
        try:
            if words[0] == "jaxllm":
                script, rest = COMMANDS[words[1]].script, words[2:]
            elif words[0] == "python" and words[1].startswith("scripts/"):
                script, rest = Path(words[1]).stem, words[2:]
                assert script in SCRIPTS, words
            else:
                checked += other_program(words)
                continue
            check_settings(parse(script, rest))
            checked += 1
        except (AssertionError, ConfigError, KeyError, SystemExit) as error:
            raise AssertionError(f"{page}: {' '.join(words)}: {error}") from error
    assert checked > 50


def other_program(words: list[str]) -> bool:
    """Whether a command is a file or module of this repository; AssertionError where it or its option is missing."""
    if words[0] == "bash" and len(words) > 1 and words[1].endswith((".sh", ".ci/run")):
        assert (ROOT / words[1]).is_file(), words
        return True
    if words[:2] != ["python", "-m"] or not words[2].startswith("benchmarks."):
        return False
    spec = importlib.util.find_spec(words[2])
    assert spec and spec.origin, words
    source = "".join(path.read_text() for path in Path(spec.origin).parent.glob("*.py"))
    for option in (word for word in words[3:] if word.startswith("--")):
        assert re.search(f'"(--)?{option[2:]}"', source), option
    return True


def test_every_script_and_config_is_named_on_the_page_of_commands() -> None:
    page = TEXTS[ROOT / "docs" / "commands.md"]
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in page, path
    for path in (ROOT / "scripts").glob("*.py"):
        assert f"scripts/{path.name}" in page, path
    for name, command in COMMANDS.items():
        assert f"| `jaxllm {name} " in page and f"| `scripts/{command.script}.py` |" in page, name


def messages() -> str:
    """All texts in the code; … stands where a value is put in."""
    found = []
    for folder in ("jaxllm", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[dsg]", "…", node.value))
    return "\n".join(found)


def test_the_messages_of_the_faq_are_those_of_the_code() -> None:
    own = TEXTS[ROOT / "docs" / "faq.md"].split("## Messages of jax")[0]
    known, headings = messages(), re.findall(r"^### `(.+)`$", own, flags=re.M)
    assert len(headings) > 25
    for heading in headings:
        parts = [part.strip(" ;:,.()") for part in heading.split("…") if re.search(r"\w{3}", part)]
        assert parts
        for part in parts:
            assert part in known, f"no message has {part!r}"
