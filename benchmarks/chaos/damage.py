"""Damaged files of a run folder: checkpoints, and metrics.jsonl."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.lanes import Lane, Start, committed, differences, results_of
from benchmarks.chaos.tally import Tally

Generator = np.random.Generator


def flipped(file: Path, rng: Generator) -> str:
    """Turns one bit."""
    data = bytearray(file.read_bytes())
    place, bit = int(rng.integers(max(len(data), 1))), int(rng.integers(8))
    if data:
        data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {place}"


def truncated(file: Path, rng: Generator) -> str:
    """Cuts a file at a random place."""
    size = int(rng.integers(max(file.stat().st_size, 1)))
    os.truncate(file, size)
    return f"cut to {size} bytes"


def deleted(file: Path, rng: Generator) -> str:
    """Removes a file."""
    del rng
    file.unlink()
    return "gone"


def zeroed(file: Path, rng: Generator) -> str:
    """Writes zeros over a block of 4 KiB, or over less of a smaller file."""
    data = bytearray(file.read_bytes())
    place = int(rng.integers(max(len(data), 1))) // 4096 * 4096
    data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    file.write_bytes(data)
    return f"zeros from byte {place}"


def checkpoints(lane: Lane, root: Path, count: int, seed: int, *, how: Callable[[Path, Generator], str]) -> Tally:
    """Damages one file of the newest checkpoint: what is restored must be what was saved, then or at the save before.

    Half of the files are chosen by their bytes, half are equally likely. Parameters alone are read as well, and the
    verdict of `read_leaves` must be that of the restore.
    """
    tally = Tally(f"{how.__name__} file", lane.name)
    base = lane.folder / "checkpoints"
    newest = base / str(committed(lane.folder))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files], float)
    saved = {path.name: json.loads((path / "data" / "metadata").read_text()) for path in base.iterdir()}
    place = root / "damage" / lane.name / how.__name__

    def trial(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 5, number])
        file = files[rng.choice(len(files), p=sizes / sizes.sum() if number % 2 else None)]
        copy = place / f"{number}" / "checkpoints"
        shutil.copytree(base, copy)
        what = f"{number}: {file.relative_to(newest)}, {how(copy / file.relative_to(base), rng)}"
        outcome = _restored(lane, copy, saved, int(newest.name))
        shutil.rmtree(place / f"{number}")
        return {"what": what, "outcome": outcome}

    for result in results_of(place, count, trial):
        tally.count(result["what"], result["outcome"])
    return tally


def _restored(lane: Lane, folder: Path, saved: dict[str, Any], newest: int) -> str:
    """What comes of reading a damaged folder in all ways."""
    from jaxllm.models import abstract_params
    from jaxllm.storage.checkpoint import Checkpoints, load_params, read_leaves
    from jaxllm.training.fingerprint import named_fingerprints
    from jaxllm.training.program import program_of
    from jaxllm.training.sharding import make_mesh, with_shardings

    try:
        program = program_of(lane.config)
        damage = read_leaves(folder, newest, arrays=True)[1]
        params = named_fingerprints({"params": load_params(folder, abstract_params(program.model))})
        manager = Checkpoints(folder, keep=2)
        try:
            found = manager.restore(with_shardings(program.abstract_state(), make_mesh()))
        finally:
            manager.close()
    except Exception as error:
        return f"traceback: {error!r}"[:300]
    if found is None:
        return "failed: nothing was restored"
    want = saved[str(found.step)]
    if named_fingerprints(found.state) != want["fingerprints"] or found.data != want["position"]:
        return "silent"
    if not any(params.items() <= each["fingerprints"].items() for each in saved.values()):
        return "silent"
    if bool(damage) == (found.step == newest):
        return f"failed: the verdict is {damage!r}, restored is step {found.step}"
    return "equal" if found.step == newest else "fell back"


def resumes(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """Damages the newest checkpoint and metrics.jsonl of a run, and resumes it with the command."""
    tally = Tally("damaged, then resumed", lane.name)
    rng = np.random.default_rng([seed, 6])
    for number in range(count):
        folder = root / "resumes" / lane.name / f"{number:03d}"
        shutil.copytree(lane.folder, folder)
        newest = folder / "checkpoints" / str(committed(folder))
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        how = (flipped, truncated, deleted, zeroed)[number % 4]
        file = files[rng.integers(len(files))]
        what = f"{number}: {file.relative_to(folder)}, {how(file, rng)}"
        ended = Start(folder, lane.config).wait()
        if ended.traceback or ended.code != 0:
            tally.count(what, f"traceback: exit {ended.code}, {ended.log.strip().splitlines()[-1:]}")
            continue
        different = differences(lane, folder)
        tally.count(what, f"failed: not bitwise: {different}" if different else "bitwise")
    return tally


def records(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """Damages metrics.jsonl: a resume must keep every row whose line is whole, up to its step."""
    tally = Tally("damaged metrics.jsonl", lane.name)
    original = (lane.folder / "metrics.jsonl").read_bytes()
    place = root / "records" / lane.name

    def trial(number: int) -> dict[str, Any]:
        from jaxllm.run.record import MetricsWriter

        rng = np.random.default_rng([seed, 7, number])
        folder = place / f"{number}"
        folder.mkdir()
        damaged, what = _damaged_text(original, rng)
        (folder / "metrics.jsonl").write_bytes(damaged)
        step = int(rng.integers(1, lane.end["step"] + 1))
        try:
            MetricsWriter(folder, resume_step=step).close()
        except Exception as error:
            return {"what": f"{number}: {what}", "outcome": f"traceback: {error!r}"[:300]}
        whole = set(original.split(b"\n"))
        want = [line for line in damaged.split(b"\n") if line in whole and line and json.loads(line)["step"] <= step]
        kept = (folder / "metrics.jsonl").read_bytes().split(b"\n")
        found = [line for line in kept if line in whole and line]
        shutil.rmtree(folder)
        return {"what": f"{number}: {what}", "outcome": "good rows kept" if found == want else "silent"}

    for result in results_of(place, count, trial):
        tally.count(result["what"], result["outcome"])
    return tally


_GARBAGE = (
    b"\x00" * 64,
    b"\xff\xfe\n",
    b"{",
    b"[]\n",
    b"null\n",
    b'{"step": "x"}\n',
    b'{"loss": 1}\n',
    b"\n\n",
    b"[" * 5000,
)


def _damaged_text(text: bytes, rng: Generator) -> tuple[bytes, str]:
    """One to three damages of a text, and what they are."""
    data, kinds = bytearray(text), []
    for _ in range(int(rng.integers(1, 4))):
        kind, place = int(rng.integers(5)), int(rng.integers(max(len(data), 1)))
        if kind == 0 and data:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = _GARBAGE[int(rng.integers(len(_GARBAGE)))]
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 300))]
        else:
            data[place : place + 200] = bytes(len(data[place : place + 200]))
        kinds.append(f"{('flip', 'cut', 'garbage', 'hole', 'zeros')[kind]} at {place}")
    return bytes(data), ", ".join(kinds)
