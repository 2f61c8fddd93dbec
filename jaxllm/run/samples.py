"""Text from a trained model, written at the end of a run: a decoder continues a prompt, T5 fills in blanks."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import TrainingConfig
from jaxllm.data.objectives import before_end
from jaxllm.data.packing import unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.generation.text import TextModel, filled_in
from jaxllm.models import Model
from jaxllm.ops.sampling import Sampling
from jaxllm.run.folder import SAMPLE

# Greedy text of a small model repeats itself; this is mild enough to show what it learned.
SAMPLING = Sampling(temperature=0.7, top_k=50)
_HELD_OUT = 2


def write_sample(folder: Path, model: Model, params: Any, pipeline: Pipeline, config: TrainingConfig) -> str | None:
    """Writes the model's answer to `config.sample_prompt` to sample.txt; None when no sample is wanted.

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
    prompt = text_model.encode(config.sample_prompt)
    options = {"max_new_tokens": config.sample_tokens, "sampling": SAMPLING, "seed": config.seed}
    (new,) = text_model.generate([prompt], **options)
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
        parts += ["--- text with blanks", tokenizer.decode(before_end(inputs, tokenizer.eos_id))]
        parts += ["--- the model's answer", tokenizer.decode(answer)]
        if truth is not None:
            parts += ["--- the truth", tokenizer.decode(truth)]
        if np.isin(inputs, tokenizer.sentinel_ids).any():
            parts += ["--- filled in", filled_in(inputs, answer, tokenizer, marks=("«", "»"))]
        parts.append("")
    return "\n".join(parts)
