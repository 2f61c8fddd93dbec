"""The documentation builds as a site without a warning, and no page of it loads anything from elsewhere.

Needs `pip install -e ".[docs]"`; skipped without.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.config.file import describe_keys

pytest.importorskip("mkdocs", reason='pip install -e ".[docs]"')
pytest.importorskip("mkdocstrings", reason='pip install -e ".[docs]"')
ROOT = Path(__file__).parent.parent
# Elements of a page that load what they name; an `a` does not.
LOADED = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*?\s(?:src|href)=\"?(?:https?:)?//[^\s>\"]+")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not LOADED.findall(page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_notebook_is_a_page_that_others_list(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / f"{path.stem}.html").is_file()
        assert f"notebooks/{path.stem}.html" in first


def test_the_table_of_settings_has_all_of_them(site: Path) -> None:
    page = (site / "settings.html").read_text(encoding="utf-8")
    for rows in describe_keys().values():
        for key, *_ in rows:
            assert f"<code>{key}</code>" in page, key


def test_the_api_shows_meanings_of_settings_and_examples_as_code(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    assert "optimizer steps" in page and "divides the logits; 0 is greedy" in page
    assert "jaxllm.generate(model, params, [[1, 2, 3], [4]]" in page


def test_the_api_shows_the_comments_on_fields_and_functions_types(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api_modules.html").read_text(encoding="utf-8"))
    assert "corpus and version, for logs and checkpoints." in page  # behind a field of Source
    assert "to queries or keys that contain the positions." in page  # above Rotate


def test_a_notebook_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import site_hooks

    output = {"data": {"image/png": "AAAA\n", "text/plain": "<Figure>"}}
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "Text."]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"text": ["1\n"]}, output]},
    ]
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    wanted = "# A title\nText.\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
    assert site_hooks.as_markdown(path) == f"{wanted}![Output of the cell](data:image/png;base64,AAAA)\n"
    monkeypatch.setattr(site_hooks, "NOTEBOOKS", tmp_path)
    config = site_hooks.on_config(type("Config", (), {"nav": [{"Notebooks": []}]})())
    assert config.nav == [{"Notebooks": [{"A title": "notebooks/one.md"}]}]
