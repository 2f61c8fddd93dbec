"""scripts/pretrain.py with a record of batches and first gradients, and with damage that this process alone sees.

`python -m tests.host.observed CONFIG [section.key=value ...] [then section.key=value ...]`: the script trains the last
run, and the same processes train the others before it. OBSERVED_DAMAGE has a JSON object, step -> kind.
"""

from __future__ import annotations

if __name__ == "__main__":
    from scripts.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import errno
import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import cache_key

from jaxllm.config import RunConfig
from jaxllm.config.file import load_config
from jaxllm.run import trainer
from jaxllm.run.parts import OnStep, StepReport
from jaxllm.storage import checkpoint_reading
from jaxllm.training.sharding import local_rows
from jaxllm.training.train_step import TrainState

PRETRAIN = Path(__file__).parent.parent.parent / "scripts" / "pretrain.py"


class Recorder:
    """An `on_step` that appends the mesh, and a digest of each row of a step, to RUN.batches/PROCESS.jsonl."""

    def __init__(self, run_dir: str | Path, *, whole: bool = True) -> None:
        """Batches are whole, or have the rows of this process."""
        self._folder, self._whole = Path(f"{run_dir}.batches"), whole

    def __call__(self, report: StepReport) -> None:
        count = len(report.batch["weights"])
        numbers = range(count) if self._whole else local_rows(count * jax.process_count())
        rows = {number: _digest(report.batch, i) for i, number in enumerate(numbers)}
        mesh = getattr(report.state().step.sharding, "mesh", None)
        self._folder.mkdir(exist_ok=True)
        with (self._folder / f"{jax.process_index()}.jsonl").open("a") as file:
            file.write(json.dumps({"step": report.step, "rows": rows, "mesh": mesh and dict(mesh.shape)}) + "\n")


def _digest(batch: dict[str, Any], row: int) -> str:
    content = b"".join(name.encode() + batch[name][row].tobytes() for name in sorted(batch))
    return hashlib.sha256(content).hexdigest()[:16]


def batches_of(run_dir: str | Path) -> dict[int, list[str]]:
    """Digests of all rows of each step, in their order, as all processes of a run recorded them."""
    found: dict[int, dict[int, str]] = {}
    for path in Path(f"{run_dir}.batches").iterdir():
        for line in map(json.loads, path.read_text().splitlines()):
            rows = found.setdefault(line["step"], {})
            for number, digest in line["rows"].items():
                assert rows.setdefault(int(number), digest) == digest  # a step that is done again has the same rows
    return {step: [rows[number] for number in range(len(rows))] for step, rows in sorted(found.items())}


def write_first_moments(run_dir: str | Path, state: TrainState) -> None:
    """Writes Adam's first moments, which follow from the gradients of the first step; each process has its shards."""
    parts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        name = jax.tree_util.keystr(path)
        for shard in leaf.addressable_shards if ".mu[" in name else ():
            bounds = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
            parts[json.dumps([name, leaf.shape, bounds])] = np.asarray(shard.data)
    Path(f"{run_dir}.moments").mkdir(exist_ok=True)
    np.savez(Path(f"{run_dir}.moments", f"{jax.process_index()}.npz"), allow_pickle=False, **parts)


def first_moments(run_dir: str | Path) -> dict[str, np.ndarray]:
    """What all processes of a run have written with `write_first_moments`."""
    found: dict[str, np.ndarray] = {}
    for file in Path(f"{run_dir}.moments").iterdir():
        with np.load(file) as parts:
            for key, part in parts.items():
                name, shape, bounds = json.loads(key)
                whole = found.setdefault(name, np.full(shape, np.nan, part.dtype))
                whole[tuple(slice(*each) for each in bounds)] = part
    return found


def mesh_of(run_dir: str | Path) -> dict[str, int] | None:
    """The mesh of the last step of the first process."""
    return json.loads(Path(f"{run_dir}.batches", "0.jsonl").read_text().splitlines()[-1])["mesh"]


def damaged(kinds: dict[str, str]) -> Any:
    """The function that reads an item of a checkpoint, with damage of these kinds by step."""
    read = checkpoint_reading.restored

    def restored(handler: Any, path: Path, arguments: Any) -> Any:
        kind, item = kinds.get(path.parent.name), path.name
        if kind == "unreadable" and item == "state":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        found = read(handler, path, arguments)
        if kind == "position" and item == "data":
            found["position"]["tokenizer"] += "0"
        if kind == "array" and item == "state":  # one that each device has whole, so that no other process reads it
            leaf = found.params["final_norm"]["weight"]
            parts = [shard.data + 1 for shard in leaf.addressable_shards]
            found.params["final_norm"]["weight"] = jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, parts
            )
        return found

    return restored


def commands_of(words: list[str]) -> list[list[str]]:
    """The settings of each run: the word `then` is between them."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "then":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def share_programs() -> None:
    """The first process compiles each program, and the others load it, which saved an eighth of the time of tests/host.

    jax's cache key contains a fingerprint of the devices. On CPUs it differs between the processes of a run (jax 0.9 to
    0.12), which would wait for each other's programs.
    """
    assert hasattr(cache_key, "_hash_accelerator_config"), "jax names it otherwise: share no programs, or name it here"
    cache_key._hash_accelerator_config = lambda hash_obj, devices: None
    jax.config.update("jax_share_binary_between_hosts", True)
    jax.config.update("jax_share_binary_between_hosts_timeout_ms", 100_000)  # before a test gives up


def main() -> None:
    """Runs the script as if it had been started directly."""
    original, path, (*before, last) = trainer.pretrain, sys.argv[1], commands_of(sys.argv[2:])

    def recorded(config: RunConfig, *callbacks: OnStep, **others: Any) -> trainer.Summary:
        record = Recorder(config.training.run_dir, whole=config.data.streams == 1)

        def call_all(report: StepReport) -> None:
            for callback in (record, *callbacks):
                callback(report)

        return original(config, on_step=call_all, **others)

    def observed(config: RunConfig, *, on_step: OnStep, **others: Any) -> trainer.Summary:
        for overrides in before:
            recorded(load_config(path, overrides))
        return recorded(config, on_step, **others)

    dispatch = trainer._dispatch

    def dispatched(run: trainer.Run, progress: trainer.Progress, **options: Any) -> trainer.Pending:
        pending = dispatch(run, progress, **options)
        if pending.step == 1:
            write_first_moments(run.config.training.run_dir, progress.state)
        return pending

    share_programs()
    trainer._dispatch = dispatched
    trainer.pretrain = observed
    checkpoint_reading.restored = damaged(json.loads(os.environ.get("OBSERVED_DAMAGE", "{}")))
    sys.path.insert(0, str(PRETRAIN.parent))
    sys.argv = [str(PRETRAIN), path, *last]
    runpy.run_path(str(PRETRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
