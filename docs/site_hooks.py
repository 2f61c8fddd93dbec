"""What mkdocs does to these pages: the table of settings, pages of notebooks, meanings of settings in the API.

Notebooks become plain pages: no Jupyter is needed, and nothing in them loads from a network.
"""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parent / "notebooks"
SETTINGS = "<!-- settings:"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the notebooks in the navigation, or leaves their section out."""
    pages = [{title_of(path): f"notebooks/{path.stem}.md"} for path in notebooks()]
    sections = [{"Notebooks": pages} if "Notebooks" in entry else entry for entry in config.nav or []]
    config.nav = [entry for entry in sections if entry != {"Notebooks": []}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook."""
    for path in notebooks():
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_markdown(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the settings where a page has their mark."""
    if SETTINGS not in markdown:
        return markdown
    before, rest = markdown.split(SETTINGS, 1)
    return f"{before}{settings_tables()}{rest.split('-->', 1)[1]}"


def notebooks() -> list[Path]:
    """The notebooks, in the order of their names."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def title_of(path: Path) -> str:
    """The first heading of a notebook, without what follows a colon."""
    lines = "".join("".join(cell["source"]) + "\n" for cell in cells_of(path)).splitlines()
    title = next((line[2:] for line in lines if line.startswith("# ")), path.stem)
    return title.split(":")[0].replace("`", "").strip()


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def as_markdown(path: Path) -> str:
    """A notebook as a page: its text, its code, and the text and pictures that it stores as outputs."""
    parts = []
    for cell in cells_of(path):
        source = "".join(cell["source"]).strip("\n")
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(each) for each in cell.get("outputs", [])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![Output of the cell](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(data.get("text/plain", "")).rstrip("\n")
    return f"```text\n{text}\n```" if text else ""


def settings_tables() -> str:
    """A table for each family's model and each section of a run."""
    from jaxllm.config.file import describe_keys

    tables: dict[str, list[str]] = {}
    for owner, rows in describe_keys().items():
        for key, kind, default, meaning in rows:
            section = key.split(".")[0]
            title = f"{section}, {owner.rsplit(' ', 1)[1]}" if section == "model" else section
            cells = (f"`{key}`", _cell(kind), f"`{_cell(default)}`", _cell(meaning))
            tables.setdefault(title, []).append(f"| {' | '.join(cells)} |")
    head = "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    return "\n\n".join(f"## {title}\n\n{head}\n" + "\n".join(rows) for title, rows in tables.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|") if "`" in text else text.replace("|", " or ")


class Meanings(griffe.Extension):
    """Documents a setting, `steps: Annotated[int, at_least(1), "optimizer steps"]`, by its type and its meaning."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Gives the examples of a docstring a form that is shown as code."""
        if obj.docstring:
            obj.docstring.value = "\n\n".join(map(_as_code, obj.docstring.value.split("\n\n")))

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Takes the last text of `Annotated` as the docstring, or else the comment on the attribute."""
        if attr.docstring is None and (comment := _comment(node, attr)):
            attr.docstring = griffe.Docstring(comment, parent=attr)
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.annotation, ast.Subscript):
            return
        name, arguments = node.annotation.value, node.annotation.slice
        if not (isinstance(name, ast.Name) and name.id == "Annotated" and isinstance(arguments, ast.Tuple)):
            return
        meaning = arguments.elts[-1]
        if isinstance(meaning, ast.Constant) and isinstance(meaning.value, str):
            attr.docstring = griffe.Docstring(meaning.value, parent=attr)
            attr.annotation = ast.unparse(arguments.elts[0])


def _comment(node: Any, attr: griffe.Attribute) -> str:
    """The comment after a field or a constant, or the comment lines above it, as a sentence."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if not isinstance(target, ast.Name):  # an attribute of self is not documented
        return ""
    path = attr.filepath
    lines = path.read_text(encoding="utf-8").splitlines() if isinstance(path, Path) else []
    if not lines:
        return ""
    behind = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset or 0 :].decode().strip()
    above = list(itertools.takewhile(lambda line: line.lstrip().startswith("#"), reversed(lines[: node.lineno - 1])))
    words = " ".join(line.strip().removeprefix("#").strip() for line in [*reversed(above), behind])
    return f"{words.strip().rstrip('.')}." if words.strip() else ""


def _as_code(paragraph: str) -> str:
    if paragraph.startswith(">>> "):
        return f"```pycon\n{paragraph}\n```"
    if not paragraph.startswith("Example:\n"):
        return paragraph
    code = paragraph.removeprefix("Example:\n")
    return f"Examples:\n{code}" if ">>>" in code else f"Examples:\n    ```python\n{code.rstrip()}\n    ```"
