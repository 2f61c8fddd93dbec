"""Writes the table of a GPU's results into README.md: python -m benchmarks.gpu.table benchmarks/results/gpu_*.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MARKERS = "<!-- gpu results: benchmarks/gpu/table.py -->", "<!-- end of gpu results -->"


def table(document: dict[str, Any]) -> str:
    """One row per measured case: speed, part of the peak, memory, what it is compared with."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [f"{document['device']} ({versions}), commit {document['commit']}:", ""]
    lines += ["| case | speed | of the peak | other |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(row for result in document["results"] if (row := _row(result)))])


def _row(result: dict[str, Any]) -> str | None:
    if "error" in result or "skipped" in result:
        return None
    units = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "sequences_per_second": "{:,.0f} sequences/s",
        "terabytes_per_second": "{:.2f} TB/s",
        "ratio": "{:.2f} x torch",
        "tflops": "{:.0f} TFLOP/s",
    }
    speed = next((form.format(result[key]) for key, form in units.items() if key in result), "")
    parts = {"mfu": "{:.1%} MFU", "part_of_measured_bandwidth": "{:.0%} of the bandwidth"}
    peak = ", ".join(form.format(result[key]) for key, form in parts.items() if key in result)
    others = {
        "peak_gb": "{:.1f} GB",
        "compile_seconds": "compiled in {:.0f} s",
        "first_loss": "loss from {:.2f}",
        "last_loss": "to {:.2f}",
        "loss": "to {:.2f}",
    }
    # A loss on synthetic tokens says nothing.
    shown = {k: f for k, f in others.items() if k in result and ("loss" not in k or result["part"] == "pretrain")}
    other = ", ".join(form.format(result[key]) for key, form in shown.items())
    other = other or result.get("summary", "")
    return f"| {result['part']} {result['case']} | {speed} | {peak} | {other} |"


def insert(document: str, text: str, markers: tuple[str, str] = MARKERS) -> str:
    """The text with what stands between the markers replaced.

    Raises:
        ValueError: when it lacks them.
    """
    begin, end = markers
    if begin not in document or end not in document:
        raise ValueError(f"there is no place for the table; put these two lines into it: {begin} and {end}")
    before, rest = document.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def main(paths: list[str]) -> None:
    """Replaces the table by those of the files."""
    documents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    readme = ROOT / "README.md"
    text = "\n\n".join(map(table, documents))
    readme.write_text(insert(readme.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
