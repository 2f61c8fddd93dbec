"""Executes notebooks without Jupyter: python docs/notebooks/execute.py docs/notebooks/*.ipynb [--store].

The code cells of a notebook run in one namespace, as its author's kernel would run them. `--store` writes what they
print and draw back into the file, so that a reader sees the pictures without running anything.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

DPI = 70  # a stored picture takes about 20 kB


def main() -> None:
    """Executes the notebooks that are named, and prints the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        begin, book = time.perf_counter(), json.loads(path.read_text(encoding="utf-8"))
        count = execute(book, path.name)
        print(f"{path.name}: {count} pictures in {time.perf_counter() - begin:.0f} s", flush=True)
        if arguments.store:
            path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def execute(book: dict[str, Any], name: str) -> int:
    """Runs the code cells in order, with their outputs put in place; returns the number of pictures."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    pictures = 0
    for number, cell in enumerate(cell for cell in book["cells"] if cell["cell_type"] == "code"):
        cell["outputs"] = run_cell("".join(cell["source"]), f"{name}, code cell {number}", namespace)
        pictures += sum("image/png" in output.get("data", ()) for output in cell["outputs"])
    return pictures


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one cell as a kernel does: printed text, open figures of pyplot, and the value of a last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs = [{"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())}] * bool(
        printed.getvalue()
    )
    figures = [plt.figure(number) for number in plt.get_fignums()]
    for figure in [*figures, *([value] if isinstance(value, Figure) and value not in figures else [])]:
        data = {"image/png": picture(figure), "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    if value is not None and not isinstance(value, Figure):
        data = {"text/plain": lines(repr(value))}
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return outputs


def picture(figure: Figure) -> str:
    """The PNG of a figure, in base64."""
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()


def lines(text: str) -> list[str]:
    """Text as notebooks keep it."""
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    main()
