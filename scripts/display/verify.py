"""Looks at runs without changing them: whether checkpoints are whole, a resume is exact, and where two runs part.

Fingerprints decide (`jaxllm.training.fingerprint`): those in each checkpoint, and the total that metrics.jsonl has of
each save. Nothing in a run folder is written, renamed or locked, so the run may train meanwhile.
"""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config.file import load_config
from jaxllm.run.record import read_metrics
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint import read_leaves
from jaxllm.storage.checkpoint_reading import CheckpointError
from jaxllm.storage.folder import CHECKPOINTS, CONFIG, DATA, METRICS, checkpoint_steps
from jaxllm.training.fingerprint import total
from jaxllm.training.names import forward_rank

# Columns of metrics.jsonl that a resume repeats to the bit.
_REPEATED = ("fingerprint", "loss", "validation/loss")


class Report(NamedTuple):
    """Whether all is as it should be, and lines that say so."""

    good: bool
    text: str


def verify_checkpoints(run: str | Path) -> Report:
    """Compares every checkpoint of a run with its fingerprints, and these with metrics.jsonl.

    Raises:
        CheckpointError: when there is no checkpoint, or one may not be read.
    """
    folder, lines, good = Path(run).expanduser(), {}, True
    recorded = _values(folder)
    for step in _kept(folder):
        right, verdict = _verdict(folder, step, recorded.get((step, "fingerprint")))
        size = sum(file.stat().st_size for file in (folder / CHECKPOINTS / str(step)).rglob("*")) / 1e6
        if size:  # the run may have removed it meanwhile
            lines[step] = f"{step:>8} {size:>9.1f} MB  {verdict}"
            good = good and right
    losses = {step: loss for step in lines if (loss := recorded.get((step, "validation/loss"))) is not None}
    if losses:
        lines[min(losses, key=losses.__getitem__)] += ", best"
    return Report(good, "\n".join([f"{folder}: {len(lines)} checkpoints", *lines.values()]))


def verify_resume(run: str | Path, step: int, count: int) -> Report:
    """Trains a copy of a run from one of its checkpoints, and compares what it records with what the run recorded.

    The copy has the run's own config, tokenizer and prepared data, and is in a temporary folder. It trains to the last
    step within `count` of which metrics.jsonl has a fingerprint. A relative data.path is in the current folder, as for
    `pretrain`.

    Raises:
        CheckpointError: when the run keeps no such checkpoint, or it is damaged.
        ValueError: when metrics.jsonl has no such fingerprint, and as `pretrain`.
    """
    folder = Path(run).expanduser()
    if step not in (kept := _kept(folder)):
        raise CheckpointError(f"{folder} keeps no checkpoint of step {step}; it keeps {', '.join(map(str, kept))}")
    before = _values(folder)
    saved = sorted(at for at, name in before if name == "fingerprint" and at > step)
    if not saved or saved[0] > step + count:
        fix = f"the next is {saved[0] - step} steps on" if saved else "there is none of a later step either"
        raise ValueError(f"{folder / METRICS} has no fingerprint of steps {step + 1} to {step + count}; {fix}")
    last = max(at for at in saved if at <= step + count)
    with tempfile.TemporaryDirectory() as place:
        copy = _copy(folder, step, Path(place) / "run")
        config = load_config(copy / CONFIG)
        nothing_else = {"sample_tokens": 0, "stop_after": None, "trackers": (), "profile": None, "norms_every": 0}
        training = dataclasses.replace(config.training, run_dir=str(copy), **nothing_else)
        if pretrain(dataclasses.replace(config, training=training), stop_at=last).step < last:
            raise KeyboardInterrupt  # a signal, which has shown nothing of the steps after it
        after = {key: value for key, value in _values(copy).items() if key[0] > step}
    equal, parting = _compare(before, after, *_REPEATED)
    counts = ", ".join(f"{sum(key[1] == name for key in equal)} of {name}" for name in _REPEATED)
    if parting is None:
        return Report(True, f"steps {step + 1} to {last} are exactly those of {folder}; equal values: {counts}")
    text = f"{parting[1]} of step {parting[0]} was {before[parting]} and is {after[parting]}; equal values before it: "
    return Report(False, f"{text}{counts}; another machine, number of devices, jax or XLA_FLAGS can be the cause")


def compare_runs(run: str | Path, other: str | Path) -> Report:
    """The first step at which the fingerprints of two runs differ, and there the first leaf in the forward pass.

    Raises:
        CheckpointError: when a folder has no checkpoint.
        ValueError: when no step has a fingerprint in both.
    """
    folders = Path(run).expanduser(), Path(other).expanduser()
    leaves = [_leaves(folder) for folder in folders]
    saved = [{(step, "fingerprint"): total(each) for step, each in kept.items()} for kept in leaves]
    first, second = (_values(folder) | totals for folder, totals in zip(folders, saved, strict=True))
    equal, parting = _compare(first, second, "fingerprint")
    if parting is None and not equal:
        raise ValueError(f"{folders[0]} and {folders[1]} have no step of which both recorded a fingerprint")
    if parting is None:
        return Report(True, f"the fingerprints of all {len(equal)} common steps are equal, up to step {equal[-1][0]}")
    lines = [f"fingerprints differ first at step {parting[0]}; those of {len(equal)} common steps before it are equal"]
    if (loss := _compare(first, second, "loss")[1]) is not None:
        lines.append(f"losses differ first at step {loss[0]}: {first[loss]} and {second[loss]}")
    kept = [step for step in leaves[0] if leaves[0][step] != leaves[1].get(step, leaves[0][step])]
    leaf = _first_leaf(*(each[kept[0]] for each in leaves)) if kept else "none of a step that differs is kept by both"
    return Report(False, "\n".join([*lines, f"checkpoint {kept[0]}: {leaf}" if kept else f"checkpoints: {leaf}"]))


def _verdict(folder: Path, step: int, recorded: str | None) -> tuple[bool, str]:
    leaves, damage = read_leaves(folder / CHECKPOINTS, step, arrays=True)
    if damage or not leaves:
        return not damage, f"damaged: {damage}" if damage else "no fingerprint, cannot be verified"
    if recorded not in (None, found := total(leaves)):
        return False, f"differs: its fingerprint is {found}, {METRICS} has {recorded} of its step"
    return True, "whole" if recorded else f"whole, {METRICS} has no fingerprint of its step"


def _kept(folder: Path) -> list[int]:
    if steps := checkpoint_steps(folder / CHECKPOINTS):
        return steps
    raise CheckpointError(f"there is no checkpoint in {folder / CHECKPOINTS}; name the training.run_dir of a run")


def _leaves(folder: Path) -> dict[int, dict[str, str]]:
    found = {step: read_leaves(folder / CHECKPOINTS, step, arrays=False)[0] for step in _kept(folder)}
    return {step: leaves for step, leaves in found.items() if leaves}


def _first_leaf(first: dict[str, str], second: dict[str, str]) -> str:
    different = [path for path in first | second if first.get(path) != second.get(path)]

    def place(path: str) -> tuple[bool, list[int]]:
        section, *names = path.split("/")
        return section != "params", [forward_rank(name) for name in names]

    return f"{len(different)} of {len(first | second)} leaves differ, first {min(different, key=place)}"


def _values(folder: Path) -> dict[tuple[int, str], Any]:
    """What metrics.jsonl has, by step and column of `_REPEATED`; of several rows of a step the last counts."""
    rows = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    return {(row["step"], name): row[name] for row in rows for name in _REPEATED if name in row}


def _compare(first: dict, second: dict, *names: str) -> tuple[list[tuple[int, str]], tuple[int, str] | None]:
    """Keys of both in order of steps, up to the first whose values differ, and that one."""
    both = sorted(key for key in first.keys() & second.keys() if key[1] in names)
    place = next((i for i, key in enumerate(both) if first[key] != second[key]), len(both))
    return both[:place], (both[place] if place < len(both) else None)


def _copy(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a run with one checkpoint; its prepared data are links, in folders of the copy's own."""
    shutil.copytree(folder / CHECKPOINTS / str(step), copy / CHECKPOINTS / str(step))
    for file in (item for item in folder.iterdir() if item.is_file()):
        shutil.copy(file, copy / file.name)
    if (folder / DATA).is_dir():
        shutil.copytree(folder.absolute() / DATA, copy / DATA, copy_function=os.symlink)
    return copy
