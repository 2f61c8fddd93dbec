"""scripts/pretrain.py with a record of its batches, and with damage that this process alone sees in checkpoints.

`python -m tests.host.observed CONFIG [section.key=value ...]`; OBSERVED_DAMAGE has a JSON object, step -> kind.
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

from jaxllm.run import trainer
from jaxllm.run.parts import StepReport
from jaxllm.storage import checkpoint_reading
from jaxllm.training.sharding import own_rows

PRETRAIN = Path(__file__).parent.parent.parent / "scripts" / "pretrain.py"


class Recorder:
    """An `on_step` that appends the mesh, and a digest of each row of a step, to RUN.batches/PROCESS.jsonl."""

    def __init__(self, run_dir: str | Path, *, whole: bool = True) -> None:
        """Batches are whole, or have the rows of this process."""
        self._folder, self._whole = Path(f"{run_dir}.batches"), whole

    def __call__(self, report: StepReport) -> None:
        count = len(report.batch["weights"])
        numbers = range(count) if self._whole else own_rows(count * jax.process_count())
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


def main() -> None:
    """Runs the script as if it had been started itself."""
    original = trainer.pretrain

    def observed(config: Any, *, on_step: Any, **others: Any) -> Any:
        record = Recorder(config.training.run_dir, whole=config.data.streams == 1)

        def both(report: StepReport) -> None:
            record(report)
            on_step(report)

        return original(config, on_step=both, **others)

    trainer.pretrain = observed
    checkpoint_reading.restored = damaged(json.loads(os.environ.get("OBSERVED_DAMAGE", "{}")))
    sys.path.insert(0, str(PRETRAIN.parent))
    sys.argv[0] = str(PRETRAIN)
    runpy.run_path(str(PRETRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
