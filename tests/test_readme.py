"""README's commands are the gate's, and its rooms those of the imports; tests/run/test_pages.py runs its code."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_architecture import IMPORTED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_its_list_of_rooms_is_in_the_order_of_their_imports() -> None:
    listed = re.findall(r"`(\w+)`", README.split("rooms before it:")[1].split(").\n")[0])
    assert sorted(listed) == sorted(IMPORTED)
    for place, room in enumerate(listed):
        assert IMPORTED[room] <= set(listed[:place]), room


def test_it_can_be_read_in_a_terminal() -> None:
    """Without what programs put between markers."""
    own = re.sub(r"<!-- (cpu|gpu) results.*?<!-- end of \1 results -->", "", README, flags=re.S)
    assert len(own.splitlines()) <= 138 and max(map(len, own.splitlines())) <= 118
    assert own.count("![") == 1
