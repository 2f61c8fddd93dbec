"""README is true: its code runs, its commands are the gate's, its table names every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from jaxllm.config.file import load_config

ROOT = Path(__file__).parent.parent
ROOMS = sorted((ROOT / "jaxllm").glob("*/__init__.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_research_code_runs(capsys) -> None:
    code = re.search(r"## Research code\n\n```python\n(.+?)```", README, flags=re.S)
    exec(compile(code.group(1), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\[\[(\d+, ){4}\d+\]\]\n", printed)


def test_the_guide_to_looking_inside_runs(capsys) -> None:
    """Its blocks run one after the other, and print the line in its comment."""
    guide = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.+?)```", guide, flags=re.S))
    exec(compile(code, "docs/study.md", "exec"), {})
    assert f"# {capsys.readouterr().out}" in guide


def test_it_holds_one_command_for_each_purpose() -> None:
    commands = re.findall(r"<!-- (main job|tests) -->\n```bash\n([^\n]+)\n```", README)
    assert [name for name, _ in commands] == ["main job", "tests"]
    main, tests = (command for _, command in commands)
    assert "scripts/pretrain.py configs/llama_tiny.yaml" in main
    assert "python -m pytest" in tests and "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_the_table_of_rooms_names_every_room_in_its_own_words() -> None:
    rooms = {path.parent.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in ROOMS}
    wanted = {name: " ".join(text.split("\n\n")[0].split()).rstrip(".") for name, text in rooms.items()}
    assert dict(re.findall(r"^\| `jaxllm/(\w+)/` \| (.+) \|$", README, flags=re.M)) == wanted


def test_every_config_and_script_is_named() -> None:
    for path in [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "scripts").glob("*.py")]:
        assert f"`{path.stem}`" in README or f"scripts/{path.name}" in README, path


def test_every_shipped_config_is_trained_by_a_command_that_its_settings_allow() -> None:
    pages = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    commands = re.findall(r"scripts/pretrain\.py (configs/\S+)((?:\s+(?:\\\n\s+)?[\w.]+=\S+)*)", pages)
    assert len(commands) >= 3
    for path, overrides in commands:
        load_config(ROOT / path, overrides.replace("\\", "").split())


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
