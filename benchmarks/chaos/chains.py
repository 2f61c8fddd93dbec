"""Interrupted starts: kills, signals, full disks, failing renames. Each chain must end as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.lanes import Lane, Start, committed, differences, results_of
from benchmarks.chaos.tally import Tally

Generator = np.random.Generator


def kills(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """Ends processes by SIGKILL, half at times that are uniform in a start, half a moment after a save began."""
    tally, chains = Tally("kill -9", lane.name), _Chains(lane, root / "kills")
    rng = np.random.default_rng([seed, 1])
    while tally.tried < count:
        folder, killed, problems = chains.folder(), 0, ""
        planned = int(rng.integers(3, 8))
        while killed < min(planned, count - tally.tried) and not problems:
            start = Start(folder, lane.config, real=rng.random() < 0.25)
            in_save = rng.random() < 0.5
            before = committed(folder)
            if in_save:
                _wait_for_save(start, folder, skip=int(rng.integers(1, 4)))
                time.sleep(rng.exponential(0.02))
            else:
                start.alive_after(rng.uniform(0, lane.seconds))
            start.send(signal.SIGKILL)
            ended = start.wait()
            problems = chains.check(tally, ended, before)
            if ended.code == 0:
                break
            killed += 1
            tally.notes["in a save"] = tally.notes.get("in a save", 0) + in_save
        problems = problems or chains.finish(tally, folder)
        tally.count(folder.name, problems or "bitwise", faults=max(killed, 1))
    return chains.verified(tally)


def signals(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """SIGTERM and SIGINT, once and twice, at any time of a start."""
    tally, chains = Tally("signals", lane.name), _Chains(lane, root / "signals")
    rng = np.random.default_rng([seed, 2])
    for _ in range(count):
        folder, number = chains.folder(), int(rng.choice([signal.SIGTERM, signal.SIGINT]))
        start = Start(folder, lane.config, real=rng.random() < 0.25)
        start.alive_after(rng.uniform(0.1, lane.seconds))
        start.send(number)
        if twice := rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.5))
            start.send(number)
        ended = start.wait()
        what = f"{folder.name} {signal.Signals(number).name} {'twice' if twice else 'once'}, exit {ended.code}"
        problems = chains.check(tally, ended, 0) or chains.finish(tally, folder)
        tally.count(what, problems or "bitwise")
    return chains.verified(tally)


def disks(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """A disk that fills up at some time of a start, with a little room left, and sometimes is emptied again."""
    tally, chains = Tally("full disk", lane.name), _Chains(lane, root / "disks")
    rng = np.random.default_rng([seed, 3])
    for _ in range(count):
        folder = chains.folder()
        room, save, emptied = int(rng.integers(0, 300)) * 1024, int(rng.integers(1, 5)), rng.random() < 0.5
        with _disk(folder) as (fill, clear, before_start):
            start = Start(folder, lane.config, before=before_start(room, lane.seconds / 3, emptied))
            _wait_for_save(start, folder, skip=save)
            fill(room)
            before = committed(folder)
            if emptied and start.alive_after(time.perf_counter() - start.begin + rng.uniform(0.2, 0.8)):
                clear()
            ended = start.wait()
            clear()
            what = f"{folder.name} room {room}, save {save}, {'emptied' if emptied else 'stays'}, exit {ended.code}"
            tally.notes["where a save failed"] = tally.notes.get("where a save failed", 0) + (
                "is not saved" in ended.log
            )
            problems = chains.check(tally, ended, before) or chains.finish(tally, folder)
            tally.count(what, problems or ("bitwise at once" if ended.code == 0 else "bitwise after a restart"))
            chains.keep(folder)
    return chains.verified(tally)


def renames(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """A rename that fails once, fails from then on, or fails after it was done, as NFS may report it."""
    tally, chains = Tally("failing rename", lane.name), _Chains(lane, root / "renames")
    rng = np.random.default_rng([seed, 4])
    for _ in range(count):
        folder, mode, at = chains.folder(), str(rng.choice(["once", "always", "after"])), int(rng.integers(0, 14))
        ended = Start(folder, lane.config, before=lambda mode=mode, at=at: _break_renames(mode, at)).wait()
        problems = chains.check(tally, ended, 0) or chains.finish(tally, folder)
        outcome = problems or ("bitwise at once" if ended.code == 0 else "bitwise after a restart")
        tally.count(f"{folder.name} {mode} at {at}, exit {ended.code}", outcome)
    return chains.verified(tally)


class _Chains:
    """Run folders of a campaign, and what must hold for each of their starts."""

    def __init__(self, lane: Lane, root: Path) -> None:
        self._lane, self._root = lane, root / lane.name
        self._folders: list[Path] = []

    def folder(self) -> Path:
        self._folders.append(self._root / f"{len(self._folders):03d}")
        return self._folders[-1]

    def check(self, tally: Tally, ended: Any, before: int) -> str:
        """The problem of a start that was disturbed; `before` is a step that was committed."""
        after = committed(self._folders[-1])
        tally.lost = max(tally.lost, before - after)
        if ended.code is None:
            return "traceback: a hang"
        if ended.traceback:
            return "traceback: " + ended.log.strip().splitlines()[-1][:200]
        return f"failed: {before - after} steps lost" if before > after else ""

    def finish(self, tally: Tally, folder: Path) -> str:
        """The problem of the last start, which nothing disturbs, or of what it ends with."""
        before = committed(folder)
        ended = Start(folder, self._lane.config).wait()
        tally.lost = max(tally.lost, before - ended.resumed)
        if ended.code != 0 or ended.traceback or ended.resumed != before:
            last = ended.log.strip().splitlines()[-1:]
            return f"failed: the last start, exit {ended.code}, resumed {ended.resumed} of {before}: {last}"
        different = differences(self._lane, folder)
        return f"failed: not bitwise: {different}" if different else ""

    def keep(self, folder: Path) -> None:
        """Copies a folder that is about to be unmounted."""
        shutil.copytree(folder, folder.with_name(f"{folder.name}.kept"), dirs_exist_ok=True)

    def verified(self, tally: Tally) -> Tally:
        """Reads the arrays of all last checkpoints, which so far are compared by what was recorded at the save."""
        kept = [each.with_name(f"{each.name}.kept") for each in self._folders]
        folders = [copy if copy.exists() else each for each, copy in zip(self._folders, kept, strict=True)]

        def trial(number: int) -> dict[str, Any]:
            from jaxllm.storage.checkpoint import read_leaves

            damage = read_leaves(folders[number] / "checkpoints", committed(folders[number]), arrays=True)[1]
            return {"what": folders[number].name, "outcome": f"failed: {damage}" if damage else ""}

        for result in results_of(self._root, len(folders), trial):
            if result["outcome"]:
                tally.failures.append(f"{tally.campaign} {tally.lane}: {result['what']}: {result['outcome']}")
        return tally


def _wait_for_save(start: Start, folder: Path, *, skip: int) -> None:
    """Returns when so many saves have begun, or the start has ended."""
    seen: set[str] = set()
    while start.alive_after(time.perf_counter() - start.begin + 0.002):
        with contextlib.suppress(OSError):
            seen |= {path.name for path in (folder / "checkpoints").iterdir() if "tmp" in path.name}
        if len(seen) >= skip:
            return


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[tuple[Callable[[int], None], Callable[[], None], Callable[..., Any]]]:
    """A small disk at a folder: functions that fill it and clear it, and one for what a start calls first.

    Mounting needs root; without it, no file may grow beyond the room that is left.
    """
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True)
    filler = folder / "filler"
    if mounted.returncode:
        yield lambda room: None, lambda: None, _limit_files
        return

    def fill(room: int) -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(2**16)) == 2**16:
                pass
        os.truncate(filler, max(filler.stat().st_size - room, 0))

    try:
        yield fill, lambda: filler.unlink(missing_ok=True), lambda *_: None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _limit_files(room: int, at: float, emptied: bool) -> Callable[[], None]:
    def limit() -> None:
        def work() -> None:
            time.sleep(at)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (room + 2**14, hard))
            time.sleep(0.5)
            if emptied:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        threading.Thread(target=work, daemon=True).start()

    return limit


def _break_renames(mode: str, at: int) -> None:
    """Patches what pathlib, etils and orbax rename by."""
    done: list[int] = []

    def broken(original: Callable[..., None]) -> Callable[..., None]:
        def rename(*arguments: Any, **options: Any) -> None:
            done.append(1)
            number = len(done) - 1
            fails = number == at or (mode == "always" and number > at)
            if not fails or mode == "after":
                original(*arguments, **options)
            if fails:
                code = errno.EIO if mode == "always" else errno.ESTALE
                raise OSError(code, os.strerror(code), str(arguments[0]))

        return rename

    os.rename, os.replace = broken(os.rename), broken(os.replace)
