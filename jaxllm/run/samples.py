"""Text from a trained model, written at the end of a run: a decoder continues a prompt, T5 fills in blanks."""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.config import RunConfig, TrainingConfig
from jaxllm.data.objectives import before_end
from jaxllm.data.packing import unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.tokenizer import Tokenizer, encode_blanks
from jaxllm.generation.text import TextModel, filled_in
from jaxllm.host import processes
from jaxllm.models import Model
from jaxllm.ops.sampling import Sampling
from jaxllm.storage.folder import SAMPLE
from jaxllm.training.program import Program
from jaxllm.training.sharding import fetch

_log = logging.getLogger(__name__)

# Greedy text of a small model repeats itself; this is mild enough to show what it learned.
SAMPLING = Sampling(temperature=0.7, top_k=50)
_HELD_OUT = 2
_COPIES = 3  # of the parameters: as given, unstacked into layers, and in the decoding layout


def check_prompt(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a blank in the prompt of an encoder-decoder's sample that the tokenizer cannot encode."""
    if config.model.encoder_decoder and config.training.sample_tokens:
        encode_blanks(config.training.sample_prompt, tokenizer)


def on_one_device(program: Program, mesh: Mesh | None, params: Any) -> Any:
    """The parameters on one device, in the compute dtype, for a few tokens; None where it has no room for them.

    Other processes than the first get a tree of None.
    """
    if mesh is None or not program.config.training.sample_tokens:
        return params
    device = jax.local_devices()[0]
    needed = _COPIES * sum(leaf.size for leaf in jax.tree.leaves(params)) * program.dtype.itemsize
    used = device.memory_stats() or {}
    large = needed > used.get("bytes_limit", math.inf) - used.get("bytes_in_use", 0)
    if "large" in processes.gather("large" if large else ""):  # of any: all copy together, or none does
        _log.info("no sample: it takes %.1f GB on one device, which has no room for that next to the run", needed / 1e9)
        return None

    def move(leaf: jax.Array) -> Any:
        cast = leaf.astype(program.dtype)
        whole = fetch(cast) if processes.several() else cast
        return jax.device_put(whole, device) if processes.index() == 0 else None

    return jax.tree.map(move, params)


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Logs an error of the block as a warning, because it must not fail a finished run."""
    try:
        yield
    except (ImportError, OSError, ValueError, OverflowError, RuntimeError) as error:
        _log.warning("the %s is not made: %s", what, error)


def write_sample(folder: Path, model: Model, params: Any, pipeline: Pipeline, config: TrainingConfig) -> str | None:
    """Writes the model's answer to `config.sample_prompt`, within its context, to sample.txt; None when none is wanted.

    T5 also gets two held-out examples, shown with their truth.
    """
    if not config.sample_tokens:
        return None
    text_model = TextModel.of(model, params, pipeline.tokenizer)
    encoder_decoder = model.config.encoder_decoder
    text = _fill_in(text_model, pipeline, config) if encoder_decoder else _continue(text_model, config)
    (folder / SAMPLE).write_text(text, encoding="utf-8")
    return text


def _continue(text_model: TextModel, config: TrainingConfig) -> str:
    prompt, most = text_model.encode(config.sample_prompt), config.sample_tokens
    if context := text_model.model.config.context:
        most = max(min(most, context - len(prompt) + 1), 1)
    (new,) = text_model.generate([prompt], max_new_tokens=most, sampling=SAMPLING, seed=config.seed)
    return text_model.decode([*prompt, *new])


def _fill_in(text_model: TextModel, pipeline: Pipeline, config: TrainingConfig) -> str:
    tokenizer = text_model.tokenizer
    held_out = itertools.chain.from_iterable(unpack_pairs(batch) for batch in pipeline.validation(1))
    examples: list[tuple[np.ndarray, np.ndarray | None]] = list(itertools.islice(held_out, _HELD_OUT))
    if config.sample_prompt:
        examples.insert(0, (np.array(text_model.encode(config.sample_prompt), np.int32), None))
    answers = text_model.generate([inputs.tolist() for inputs, _ in examples], max_new_tokens=config.sample_tokens)
    parts = []
    for (inputs, truth), answer in zip(examples, answers, strict=True):
        blanks = np.isin(inputs, tokenizer.sentinel_ids).any()
        text = tokenizer.decode(before_end(inputs, tokenizer.eos_id))
        parts += ["--- text with blanks" if blanks else "--- text", text]
        parts += ["--- the model's answer", tokenizer.decode(answer)]
        if truth is not None:
            parts += ["--- the truth", tokenizer.decode(truth)]
        if blanks:
            parts += ["--- filled in", filled_in(inputs, answer, tokenizer, marks=("«", "»"))]
        parts.append("")
    return "\n".join(parts)
