"""How fast text becomes training rows on one core: span corruption alone, next to a simpler way, and the pipeline.

    python -m benchmarks.objectives

Alone: 568 tokens -> 512 inputs and 114 targets, in tokens of text per second. The variants take turns, and the examples
of each are turned back into their text first. Pipeline: read, tokenise, corrupt, pack, shuffle and batch the embedded
corpus, next to reading and tokenising alone, which bounds it. Results go to benchmarks/results/objectives_*.json.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.report import spread
from benchmarks.sides import environment, save
from jaxllm.config import DataConfig
from jaxllm.data.objectives import Denoiser, fill_spans, noise_of, span_corruption
from jaxllm.data.packing import unpack_pairs
from jaxllm.run.feed import build_pipeline

RAW, ROWS = 568, 256
T5 = Denoiser(0.15, 3.0)
SENTINELS = np.arange(32099, 31999, -1, dtype=np.int32)
Variant = Callable[[np.random.Generator, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]


def batched(rng: np.random.Generator, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ours: all rows at once."""
    return zip(*span_corruption(rng, tokens, T5, sentinels=SENTINELS, eos_id=1), strict=True)


def one_by_one(rng: np.random.Generator, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """NumPy on one example at a time, as T5's own TensorFlow graph does it."""
    noise, spans = noise_of(RAW, T5)

    def parts(items: int) -> np.ndarray:
        marks = np.arange(items - 1) < spans - 1
        rng.shuffle(marks)
        return np.bincount(np.cumsum(np.concatenate([[0], marks])))

    def side(row: np.ndarray, mask: np.ndarray) -> np.ndarray:
        first = mask & ~np.concatenate([[False], mask[:-1]])
        marked = np.where(first, SENTINELS[np.cumsum(first) - 1], row)
        return np.append(marked[~mask | first], 1)

    def one(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        runs = np.stack([parts(RAW - noise), parts(noise)], axis=1).ravel()
        mask = np.repeat(np.arange(2 * spans) % 2 == 1, runs)
        return side(row, mask), side(row, ~mask)

    return iter([one(row) for row in tokens])


VARIANTS: dict[str, Variant] = {"batched": batched, "one_by_one": one_by_one}


def objective_alone(turns: int) -> dict[str, dict[str, float]]:
    """Tokens of text per second of each variant: median, slowest and fastest turn."""
    tokens = np.random.default_rng(0).integers(3, 32000, (ROWS, RAW), dtype=np.int32)
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for variant in VARIANTS.values():
        for row, (inputs, targets) in zip(tokens, variant(np.random.default_rng(1), tokens), strict=True):
            np.testing.assert_array_equal(fill_spans(inputs, targets, sentinels=SENTINELS, eos_id=1), row)
            assert (len(inputs), len(targets)) == (512, 114)
    for turn in range(turns):
        for name, variant in VARIANTS.items():
            rng = np.random.default_rng(turn)
            before, done = time.perf_counter(), 0
            while time.perf_counter() - before < 0.3:
                variant(rng, tokens)
                done += tokens.size
            rates[name].append(done / (time.perf_counter() - before))
    return {name: spread(found) for name, found in rates.items()}


CONFIGS = {
    "causal": DataConfig(objective="causal", sequence_length=512),
    "span_corruption": DataConfig(objective="span_corruption", sequence_length=512),
    "ul2": DataConfig(objective="ul2", sequence_length=512, target_length=256, example_length=256),
}
BATCH, WINDOW = 64, 2048  # rows; the pipeline reads a window at once and then hands it out


def whole_pipeline(folder: Path, name: str, *, workers: int) -> float:
    """Tokens of text per second from the embedded corpus to batches, over one whole window after the first."""
    config = dataclasses.replace(CONFIGS[name], workers=workers, cache_dir=str(folder / "data"))
    pipeline = build_pipeline(config, vocab_size=8192, batch_size=BATCH, seed=0, run_dir=folder)
    with contextlib.closing(pipeline):
        per_window = WINDOW // BATCH
        for _ in range(per_window):
            next(pipeline)
        before = time.perf_counter()
        batches = [next(pipeline) for _ in range(per_window)]
        elapsed = time.perf_counter() - before
    special = [pipeline.tokenizer.eos_id, *pipeline.tokenizer.sentinel_ids]
    examples = itertools.chain.from_iterable(unpack_pairs(batch) for batch in batches)
    restored = (pipeline.recipe.restore(inputs, targets) for inputs, targets in examples)
    return sum(np.count_nonzero(~np.isin(text, special)) for text in restored) / elapsed


def tokeniser_alone(folder: Path) -> float:
    """Tokens per second of the tokenizer on the embedded corpus, which bounds every pipeline on one core."""
    config = DataConfig(cache_dir=str(folder / "data"))
    pipeline = build_pipeline(config, vocab_size=8192, batch_size=1, seed=0, run_dir=folder)
    before, count = time.perf_counter(), 0
    for tokens in pipeline.tokens(200):
        count += len(tokens)
    return count / (time.perf_counter() - before)


def main() -> None:
    """Runs everything and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of each variant")
    parser.add_argument("--workers", type=int, nargs="*", default=[0], help="numbers of worker processes to try")
    arguments = parser.parse_args()
    result: dict[str, object] = {"benchmark": "objectives", "alone": objective_alone(arguments.turns)}
    with tempfile.TemporaryDirectory() as folder:
        result["tokeniser_alone_tokens_per_second"] = tokeniser_alone(Path(folder))
        result["pipeline_tokens_per_second"] = {
            f"{name}, {workers} workers": whole_pipeline(Path(folder), name, workers=workers)
            for name in CONFIGS
            for workers in arguments.workers
        }
    result |= environment()
    save("objectives", result)
    print(json.dumps({name: result[name] for name in list(result)[1:4]}, indent=1))


if __name__ == "__main__":
    main()
