"""What a trained model says, written at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxllm.config import TrainingConfig
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.generation import generate
from jaxllm.models import Model
from jaxllm.ops.sampling import Sampling

# Greedy text of a small model runs in circles; this is mild enough to show what it learned.
SAMPLING = Sampling(temperature=0.7, top_k=50)


def write_sample(folder: Path, model: Model, params: Any, tokenizer: Tokenizer, config: TrainingConfig) -> str | None:
    """Continues `config.sample_prompt` and writes it to sample.txt; None when no sample is asked for."""
    if not config.sample_tokens:
        return None
    prompt = [tokenizer.eos_id, *(int(i) for i in tokenizer.encode(config.sample_prompt))]
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
    text = tokenizer.decode([*prompt[1:], *kept])
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    return text
