"""Writes t5.npz, transformers' results for tests/parity/t5_cases.py: python -m tests.golden.make_t5.

Needs the extra `parity`. Per case: `about` (config.json and tensor shapes, as JSON), float32 logits, loss, a summary
of every gradient in the order of the sorted tensor names, and greedy continuations.
"""

from __future__ import annotations

import json

import numpy as np

from tests.parity import t5_cases as cases
from tests.parity.torch_t5 import build, greedy, numbers


def main() -> None:
    """Runs transformers on every case."""
    kept: dict[str, np.ndarray] = {}
    for name in cases.CASES:
        model = build(name)
        result = numbers(model)
        shapes = {key: list(value.shape) for key, value in sorted(result.grads.items())}
        about = {"config": json.loads(model.config.to_json_string(use_diff=False)), "shapes": shapes}
        about["config"]["architectures"] = [type(model).__name__]
        kept[f"{name}/about"] = np.array(json.dumps(about, sort_keys=True))
        kept[f"{name}/logits"] = result.logits
        kept[f"{name}/loss"] = np.float32(result.loss)
        kept[f"{name}/grads"] = np.stack([cases.grad_summary(key, result.grads[key]) for key in shapes])
        kept[f"{name}/greedy"] = np.array(greedy(model), np.int32)
        print(name, result.logits.std(), result.loss, kept[f"{name}/greedy"].tolist(), result.grads.keys() ^ shapes)
    np.savez_compressed(cases.GOLDEN, **kept)
    print(f"{cases.GOLDEN}: {cases.GOLDEN.stat().st_size} bytes, {len(cases.CASES)} cases")


if __name__ == "__main__":
    main()
