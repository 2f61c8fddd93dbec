"""Writes what GPUs measured into README.md (headline cases) and docs/gpu.md (all, with the largest kernels).

python -m benchmarks.gpu.table [FILE ...]        # benchmarks/results/gpu_*.json without any
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import ROOT

MARKERS = "<!-- gpu results: benchmarks/gpu/table.py -->", "<!-- end of gpu results -->"
# README's rows; docs/gpu.md has all.
HEADLINES = (
    *("pretrain/llama_fp16", "pretrain/t5_fp16", "train/llama_1b", "train/llama_8b_8layers", "train/t5_large"),
    *("train/llama_1b_fp16", "train/t5_large_fp16", "decode/1b_b1", "decode/8b_b1", "decode/t5_large_b1"),
    *("baseline/llama_1b_train", "baseline/t5_large_train", "baseline/llama_1b_decode", "baseline/llama_8b_decode"),
    *("baseline/t5_large_decode", "tests/gpu"),
)
NONE = """\
No GPU figure exists yet: none could be had while this was written. `bash benchmarks/run_gpu.sh first` makes the most
important ones in seven minutes on any NVIDIA GPU."""
_SPEEDS = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "sequences_per_second": "{:,.0f} sequences/s",
    "terabytes_per_second": "{:.2f} TB/s",
    "ratio": "{:.2f} x torch",
    "tflops": "{:.0f} TFLOP/s",
}
_FRACTIONS = {"mfu": "{:.1%} MFU", "part_of_measured_bandwidth": "{:.0%} of the measured bandwidth"}
_OTHERS = {
    "peak_gb": "{:.1f} GB",
    "cudnn_calls": "{} calls of cuDNN's attention",
    "compile_seconds": "compiled in {:.0f} s",
    "first_loss": "loss from {:.2f}",
    "last_loss": "to {:.2f}",
    "killed_at": "killed at step {}",
    "resumed_from": "resumed from step {}",
    "skipped": "{:.0f} steps skipped",
    "verdict": "{}",
    "summary": "{}",
}


def table(document: dict[str, Any], only: tuple[str, ...] | None = None) -> str:
    """One row per measured case, of those named `only`; empty where none is measured."""
    wanted = [each for each in document["results"] if only is None or f"{each['part']}/{each['case']}" in only]
    rows = [row for each in wanted if (row := _row(each))]
    if not rows:
        return ""
    versions = {name: version for each in wanted for name, version in each.get("versions", {}).items()}
    made = ", ".join(sorted({f"{each['commit']} on {each['date']}" for each in wanted if "error" not in each}))
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = f"{document['device']} ({shown}), commit {made}:"
    return "\n".join([head, "", "| case | speed | of the peak | other |", "| --- | --- | --- | --- |", *rows])


def _row(result: dict[str, Any]) -> str | None:
    if "error" in result or not result.get("tokens_agree", True):
        return None
    speed = next((form.format(result[key]) for key, form in _SPEEDS.items() if key in result), "")
    peak = ", ".join(form.format(result[key]) for key, form in _FRACTIONS.items() if key in result)
    # A loss on synthetic tokens has no meaning.
    shown = {k: f for k, f in _OTHERS.items() if k in result and ("loss" not in k or result["part"] == "pretrain")}
    other = ", ".join(form.format(result[key]) for key, form in shown.items())
    return f"| {result['part']} {result['case']} | {speed} | {peak} | {other} |"


def failures(document: dict[str, Any]) -> str:
    """The cases that failed, each with the last line of its error."""
    failed = [each for each in document["results"] if "error" in each]
    lines = [f"* {each['part']} {each['case']}: {each['error'].strip().splitlines()[-1]}" for each in failed]
    wrong = [each for each in document["results"] if not each.get("tokens_agree", True)]
    lines += [f"* {each['part']} {each['case']}: its tokens are not those of a forward pass" for each in wrong]
    return "\n".join(["Failed or not finished:", "", *lines]) if lines else ""


def profiles(document: dict[str, Any], most: int = 15) -> str:
    """The largest kernels of each case whose kernels were timed."""
    parts = []
    for each in document["results"]:
        rows = each.get("kernels", [])[:most]
        if rows:
            lines = [
                f"| {row['milliseconds']:.3f} | {row['calls']:.0f} | `{row['name']}` {row['where']} |" for row in rows
            ]
            head = f"Kernels of {each['part']} {each['case']}, milliseconds and calls of one step:"
            parts.append("\n".join([head, "", "| ms | calls | kernel |", "| --- | --- | --- |", *lines]))
    return "\n\n".join(parts)


def insert(document: str, text: str, markers: tuple[str, str] = MARKERS) -> str:
    """The text with what stands between the markers replaced.

    Raises:
        ValueError: when it lacks them.
    """
    begin, end = markers
    if begin not in document or end not in document:
        raise ValueError(f"the table has no place; put these two lines into it: {begin} and {end}")
    before, rest = document.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def main(paths: list[str], root: Path = ROOT) -> None:
    """Replaces both tables by what the files hold."""
    files = [Path(path) for path in paths] or sorted((root / "benchmarks" / "results").glob("gpu_*.json"))
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    short = [table(document, HEADLINES) for document in documents]
    full = [part for each in documents for part in (table(each), failures(each), profiles(each))]
    for file, parts in ((root / "README.md", short), (root / "docs" / "gpu.md", full)):
        text = "\n\n".join(filter(None, parts)) or NONE
        file.write_text(insert(file.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
