"""What a trained model says, written at the end of a run: a decoder continues a prompt, T5 fills in blanks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import TrainingConfig
from jaxllm.data.objectives import before_end
from jaxllm.data.packing import unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.tokenizer import Tokenizer, encode_blanks
from jaxllm.generation import generate
from jaxllm.models import Model
from jaxllm.ops.sampling import GREEDY, Sampling

# Greedy text of a small model runs in circles; this is mild enough to show what it learned.
SAMPLING = Sampling(temperature=0.7, top_k=50)
_HELD_OUT = 2


def write_sample(folder: Path, model: Model, params: Any, pipeline: Pipeline, config: TrainingConfig) -> str | None:
    """Writes what the model makes of `config.sample_prompt` to sample.txt; None when no sample is asked for.

    T5 also gets two held-out examples, of which the truth is shown.
    """
    if not config.sample_tokens:
        return None
    text = (_fill_in if model.config.encoder_decoder else _continue)(model, params, pipeline, config)
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    return text


def _continue(model: Model, params: Any, pipeline: Pipeline, config: TrainingConfig) -> str:
    tokenizer = pipeline.tokenizer
    prompt = [tokenizer.eos_id, *tokenizer.encode(config.sample_prompt).tolist()]
    new = generate(
        model,
        params,
        [prompt],
        max_new_tokens=config.sample_tokens,
        sampling=SAMPLING,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
        seed=config.seed,
    )[0]
    kept = [token for token in new if token != tokenizer.eos_id]
    return tokenizer.decode([*prompt[1:], *kept])


def _fill_in(model: Model, params: Any, pipeline: Pipeline, config: TrainingConfig) -> str:
    tokenizer = pipeline.tokenizer
    held_out = itertools.chain.from_iterable(unpack_pairs(batch) for batch in pipeline.validation(1))
    examples: list[tuple[np.ndarray, np.ndarray | None]] = list(itertools.islice(held_out, _HELD_OUT))
    if config.sample_prompt:
        examples.insert(0, (encode_blanks(config.sample_prompt, tokenizer), None))
    written = generate(
        model,
        params,
        [inputs.tolist() for inputs, _ in examples],
        max_new_tokens=config.sample_tokens,
        sampling=GREEDY,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    parts = []
    for (inputs, truth), answer in zip(examples, written, strict=True):
        parts += ["--- text with blanks", tokenizer.decode(before_end(inputs, tokenizer.eos_id))]
        parts += ["--- the model's answer", tokenizer.decode(answer)]
        if truth is not None:
            parts += ["--- the truth", tokenizer.decode(truth)]
        if np.isin(inputs, tokenizer.sentinel_ids).any():
            parts += ["--- filled in", filled_in(inputs, np.array(answer, np.int32), tokenizer)]
        parts.append("")
    return "\n".join(parts)


def filled_in(inputs: np.ndarray, answer: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text with what was written for each blank between guillemets."""
    answers = {}
    for part in _before_sentinels(before_end(answer, tokenizer.eos_id), tokenizer):
        answers.setdefault(int(part[0]), part[1:])
    text = ""
    for part in _before_sentinels(before_end(inputs, tokenizer.eos_id), tokenizer):
        if part[0] in tokenizer.sentinel_ids:
            text += f"«{tokenizer.decode(answers.get(int(part[0]), part[:0]))}»"
            part = part[1:]
        text += tokenizer.decode(part)
    return text


def _before_sentinels(tokens: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    cuts = np.flatnonzero(np.isin(tokens, tokenizer.sentinel_ids))
    return [part for part in np.split(tokens, cuts) if len(part)]
