"""Ours against transformers on torch: outputs agree first, then ours, theirs, ours, theirs, each in its own process.

Theirs is the fastest of its forms: rows of a batch, loss over all logits or in chunks, attention kernel, mode of the
compiler; for decoding, transformers' `generate` and a loop written by hand. Every form that was tried is in the result,
with its rate or its error. The result so far is printed after every process, so that an interrupted case keeps what was
measured; the last line is the most complete one.

Environment: BASELINE_SECONDS is the time for a case (390); the second turns of both sides take precedence over further
forms. BASELINE_OURS names a file with RESULT lines of the same call: our first turn is taken from it and marked
`recorded`.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu import decode, train
from benchmarks.gpu.card import Sensors
from benchmarks.report import report, results_in


class Form(NamedTuple):
    """How theirs runs."""

    mode: str = "default"  # of torch.compile for training; `generate`, `loop` or `loop_tuned` for decoding
    rows: int = 0  # of a batch; 0 for decoding, whose batch is one prompt
    loss: str = "whole"  # `whole`, or `chunked` over the vocabulary's logits
    attention: str = "auto"  # as `torch_models.model_of` takes it

    def label(self) -> str:
        """The form in words."""
        training = f"{self.rows} rows, {self.loss} loss, {self.attention} attention, "
        return (training if self.rows else "") + self.mode


class Case(NamedTuple):
    """What is compared."""

    what: str  # train or decode
    ours: str  # our case of that part
    start: Form  # the form of theirs that is tried first


CASES = {
    "llama_1b_decode": Case("decode", "1b_b1", Form("loop")),
    "llama_1b_train": Case("train", "llama_1b", Form(rows=4)),
    "t5_large_train": Case("train", "t5_large", Form(rows=64)),
    "llama_8b_decode": Case("decode", "8b_b1", Form("loop")),
    "t5_large_decode": Case("decode", "t5_large_b1", Form("loop")),
}
# Float32 logits of both sides, relative to the largest; matmuls on a GPU are less exact than on a CPU.
_AGREE = 2e-3
TOY_FORMS = {"train": 1, "decode": 2}  # forms in a dry run; a CPU compiles each for a minute
_SECONDS = 390.0
_ONE = 180.0  # seconds that one process of theirs may take: a slow compilation must not eat the call
_LEAST = 40.0  # seconds below which no process is started


class Turns:
    """The processes of one case in order, each reported at once."""

    def __init__(self, name: str, *, toy: bool) -> None:
        """Starts the clock."""
        self.name, self.case, self.toy = name, CASES[name], toy
        self.turns: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self._end = time.monotonic() + float(os.environ.get("BASELINE_SECONDS", _SECONDS))

    def left(self) -> float:
        """Seconds that remain."""
        return self._end - time.monotonic()

    def ours(self, *, recorded: dict[str, Any] | None = None) -> None:
        """One turn of ours, or what was recorded of it."""
        part = self.case.what
        arguments = ["--one", f"{part}/{self.case.ours}", *(["--dry-run"] if self.toy else [])]
        measure = functools.partial(_process, "benchmarks.gpu.run", *arguments, limit=self.left())
        turn = {**recorded, "recorded": True} if recorded else measure()
        rate = "sequences_per_second" if "sequences_per_second" in turn else "tokens_per_second"
        kept = {key: turn[key] for key in ("seconds", "peak_gb", "error", "recorded", "wall", "gpu") if key in turn}
        self._add({"side": "ours", **kept, **({"rate": turn[rate]} if rate in turn else {})})

    def theirs(self, form: Form) -> None:
        """One turn of theirs in a form."""
        arguments = self.case.what, _arguments(self.case, form, toy=self.toy)
        limit = self.left() if self.toy else min(_ONE, self.left())
        turn = _process("benchmarks.gpu.torch_side", *arguments, limit=limit)
        self.facts["versions"] = turn.pop("versions", self.facts.get("versions"))
        kept = {key: value for key, value in turn.items() if key not in ("part", "case")}
        self._add({"side": "theirs", "form": form._asdict(), **kept})

    def _add(self, turn: dict[str, Any]) -> None:
        self.turns.append(turn)
        report("baseline", self.name, **self.result(complete=False))

    def seconds_of(self, side: str) -> float:
        """What the longest turn of a side took; zero before the first."""
        return max((turn.get("wall", 0.0) for turn in self.turns if turn["side"] == side), default=0.0)

    def rates(self) -> dict[Form, list[float]]:
        """Rates of theirs by form; an empty list for a form that failed."""
        rates: dict[Form, list[float]] = {}
        for turn in self.turns:
            if turn["side"] == "theirs":
                rates.setdefault(Form(**turn["form"]), []).extend([turn["rate"]] if "rate" in turn else [])
        return rates

    def best(self) -> Form | None:
        """The fastest form that was measured."""
        measured = {form: np.mean(rates) for form, rates in self.rates().items() if rates}
        return max(measured, key=lambda form: measured[form], default=None)

    def result(self, *, complete: bool) -> dict[str, Any]:
        """All turns, and of both sides' rates the ratio to the fastest form, its range, and that to every form."""
        ours = [turn["rate"] for turn in self.turns if turn["side"] == "ours" and "rate" in turn]
        best, every = self.best(), self.rates()
        values: dict[str, Any] = {"complete": complete, **self.facts, "ours": ours}
        if best is not None:
            values |= {"theirs": every[best], "best": best._asdict()}
        if best is not None and ours:
            ratios = {form.label(): np.mean(ours) / np.mean(rates) for form, rates in every.items() if rates}
            values |= {
                "ratio": np.mean(ours) / np.mean(every[best]),
                "ratio_range": [min(ours) / max(every[best]), max(ours) / min(every[best])],
                "ratios": ratios,
            }
        return {**values, "turns": self.turns}


def main(name: str, *, toy: bool) -> None:
    """Measures and reports one case.

    Raises:
        SystemExit: when torch is not installed, the logits differ, or a side was never measured.
    """
    missing = [each for each in ("torch", "transformers") if importlib.util.find_spec(each) is None]
    if missing:
        raise SystemExit(f"baseline/{name} compares with {' and '.join(missing)}, not installed here: pip install them")
    turns = Turns(name, toy=toy)
    turns.facts["logits_difference"] = difference = agreement(turns.case, toy=toy, limit=min(_ONE, turns.left()))
    if not difference < _AGREE:
        raise SystemExit(f"{name}: the logits differ by {difference:.1e}; the speed of a wrong model means nothing")
    turns.ours(recorded=recorded(turns.case))
    search(turns, most=TOY_FORMS[turns.case.what] if toy else 99)
    if not toy:
        second_turns(turns)
    result = turns.result(complete=True)
    report("baseline", name, **result)
    if "ratio" not in result:
        raise SystemExit(f"{name}: no form of {'theirs' if result['ours'] else 'ours'} was measured")


def search(turns: Turns, *, most: int) -> None:
    """Tries forms of theirs, from the first to what could be faster than the fastest so far.

    Stops when nothing is left to try, or when the time would no longer suffice for a second turn of both sides.
    """
    form: Form | None = turns.case.start
    while form is not None and len(turns.rates()) < most:
        longest = turns.seconds_of("theirs")
        reserved = turns.seconds_of("ours") + longest if longest else 0.0
        if turns.left() - reserved < max(_LEAST, longest):
            turns.facts["untried"] = form.label()  # and what might have come after it
            return
        turns.theirs(form)
        tried, best = turns.rates(), turns.best()
        candidates = neighbours(best, turns.case) if best is not None else fallbacks(form)
        form = next((each for each in candidates if each not in tried), None)


def neighbours(best: Form, case: Case) -> Iterator[Form]:
    """Forms that may be faster than this one, most promising first."""
    if case.what == "decode":
        yield from (Form(mode) for mode in ("loop", "generate", "loop_tuned"))
        return
    yield best._replace(rows=2 * best.rows)
    yield best._replace(loss="chunked")
    yield best._replace(rows=2 * best.rows, loss="chunked")
    yield from (best._replace(rows=best.rows // 2) for _ in range(best.rows > 1))
    kernels = ("flex_attention",) if case.ours.startswith("t5") else ("cudnn", "flash")
    yield from (best._replace(attention=each) for each in kernels)
    yield best._replace(mode="max-autotune-no-cudagraphs")


def fallbacks(failed: Form) -> Iterator[Form]:
    """What to try while nothing has been measured: less memory, or the other ways of decoding."""
    if failed.mode in ("loop", "generate"):
        yield Form("generate")
    elif failed.rows > 1:
        yield failed._replace(rows=failed.rows // 2)


def second_turns(turns: Turns) -> None:
    """Ours and the fastest form again, as far as there is time; of decoding also `generate`, which is published too."""
    if turns.best() is not None and turns.left() > turns.seconds_of("ours"):
        turns.ours()
    measured = [form for form, rates in turns.rates().items() if rates]
    for form in sorted(measured, key=lambda form: form != turns.best()):
        if turns.left() > _LEAST and (form == turns.best() or form.mode == "generate"):
            turns.theirs(form)


def _arguments(case: Case, form: Form, *, toy: bool) -> str:
    if case.what == "decode":
        ours = decode.case_of(case.ours)
        sizes = {"prompt": 16, "new": 8} if toy else {"prompt": ours.prompt, "new": ours.new}
        return json.dumps({"shape_name": ours.shape, "toy": toy, **sizes, "mode": form.mode})
    ours = train.case_of(case.ours)
    sizes = (
        {"length": 16, "targets": 8 if ours.targets else 0} if toy else {"length": ours.length, "targets": ours.targets}
    )
    return json.dumps({"shape_name": ours.shape, "toy": toy, **sizes, **form._asdict()})


def recorded(case: Case) -> dict[str, Any] | None:
    """Our result in the file that BASELINE_OURS names; the newest one, or None."""
    path = os.environ.get("BASELINE_OURS")
    results = results_in(Path(path).read_text(encoding="utf-8")) if path and Path(path).exists() else []
    fitting = [each for each in results if (each["part"], each["case"]) == (case.what, case.ours)]
    return next((each for each in reversed(fitting) if "error" not in each), None)


def agreement(case: Case, *, toy: bool, limit: float = _ONE) -> float:
    """Largest difference of the two sides' logits, relative to the largest logit.

    Raises:
        SystemExit: when a side has none.
    """
    ours: Any = (decode if case.what == "decode" else train).case_of(case.ours)
    with tempfile.TemporaryDirectory() as folder:
        arguments = json.dumps({"shape_name": ours.shape, "toy": toy, "folder": folder})
        sides = [
            _process("benchmarks.gpu.torch_side", "export", arguments, limit=limit),
            _process("benchmarks.gpu.baseline", folder, limit=limit),
        ]
    if error := next((side["error"] for side in sides if "error" in side), None):
        raise SystemExit(f"the two models could not be compared: {error}")
    return sides[1]["difference"]


def _process(module: str, *arguments: str, limit: float = _ONE) -> dict[str, Any]:
    """The last result that a module's process printed, seconds and sensors; or its error. Never raises for it."""
    command, before = [sys.executable, "-m", module, *arguments], time.monotonic()
    # A file, because a pipe stays open while any worker of a killed process lives.
    with tempfile.TemporaryFile("w+") as output, Sensors() as sensors:
        try:
            code = subprocess.run(command, stdout=output, check=False, timeout=max(limit, 1.0)).returncode
            failed = {"error": f"{module} ended with {code}"} if code else {}
        except subprocess.TimeoutExpired:
            failed = {"error": f"took more than {limit:.0f} s"}
        output.seek(0)
        found = results_in(output.read())
    result = found[-1] if found else {"error": f"{module} printed no result"}
    return {**result, **failed, "wall": round(time.monotonic() - before, 1), "gpu": sensors.readings()}


def agree(folder: Path) -> float:
    """Largest difference of our logits from those that `torch_side export` left, relative to the largest logit."""
    import jax

    from jaxllm import load_hf

    model, params = load_hf(str(folder))
    names = [name for name in ("input_ids", "decoder_input_ids") if (folder / f"{name}.npy").exists()]
    tokens, theirs = [np.load(folder / f"{name}.npy") for name in names], np.load(folder / "logits.npy")
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p, *t: model.apply({"params": p}, *t))(params, *tokens)
    return float(np.abs(np.asarray(logits) - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    report("baseline", "agreement", difference=agree(Path(sys.argv[1])))
