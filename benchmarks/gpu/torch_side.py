"""The baseline: transformers on torch with compile and SDPA, in a process of its own.

    python -m benchmarks.gpu.torch_side export|train|decode SHAPE FOLDER [--toy]

`export` leaves a shallow model of the shape's width, tokens and its logits, for the other side to agree with.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.gpu.common import shape, spread
from jaxllm.config import LlamaConfig, T5Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of(config: LlamaConfig | T5Config, *, layers: int | None = None) -> Any:
    """The model of a shape in transformers, randomly initialised on the device."""
    common: dict[str, Any] = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    if isinstance(config, LlamaConfig):
        theirs = transformers.LlamaConfig(
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=layers or config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            **common,
        )
        kind: Any = transformers.LlamaForCausalLM
    else:
        common["decoder_start_token_id"] = config.decoder_start_id
        theirs = transformers.T5Config(
            d_model=config.d_model,
            d_kv=config.head_dim,
            d_ff=config.d_ff,
            num_layers=layers or config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            **common,
        )
        kind = transformers.T5ForConditionalGeneration
    with torch.device(DEVICE):
        return kind(theirs)


def inputs_of(config: LlamaConfig | T5Config, rows: int, length: int, targets: int) -> dict[str, torch.Tensor]:
    """Random tokens, by transformers' argument names."""
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(1, config.vocab_size, (rows, length)), device=DEVICE)
    if isinstance(config, LlamaConfig):
        return {"input_ids": tokens}
    decoder = torch.tensor(rng.integers(1, config.vocab_size, (rows, targets)), device=DEVICE)
    return {"input_ids": tokens, "decoder_input_ids": decoder}


def export(config: LlamaConfig | T5Config, folder: Path) -> dict[str, Any]:
    """Saves a shallow float32 model, tokens and logits."""
    model = model_of(config, layers=2).float().eval()
    inputs = inputs_of(config, 2, 64, 32)
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(folder)
    for name, array in {"logits": logits, **inputs}.items():
        np.save(folder / f"{name}.npy", array.cpu().numpy())
    return {}


def train(config: LlamaConfig | T5Config, *, toy: bool) -> dict[str, Any]:
    """Rows (or tokens) per second of a step: autocast, compiled forward, fused AdamW, clipping."""
    t5 = isinstance(config, T5Config)
    length, targets = (16, 8) if toy else (512, 114) if t5 else (4096, 0)
    model = model_of(config).train()
    compiled = model if toy else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(inputs: dict[str, torch.Tensor]) -> float:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            logits = compiled(**inputs).logits
        wanted = inputs["decoder_input_ids" if t5 else "input_ids"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    for rows in (2,) if toy else (64, 32, 16) if t5 else (4, 2, 1):
        inputs = inputs_of(config, rows, length, targets)
        try:
            times = spread(_timed(functools.partial(step, inputs), warm=1 if toy else 4, count=1 if toy else 12))
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            continue
        rate = rows / times["median"] if t5 else rows * length / times["median"]
        return {"seconds": times, "rows": rows, "rate": rate}
    raise SystemExit("no batch fits")


def decode(config: LlamaConfig | T5Config, *, toy: bool) -> dict[str, Any]:
    """Greedy tokens per second at batch 1: static cache and compiled steps for Llama, eager for T5."""
    dtype = torch.float32 if toy else torch.bfloat16
    model = model_of(config).to(dtype).eval()
    prompt, short, long = (16, 2, 6) if toy else (512, 32, 256)
    tokens = inputs_of(config, 1, prompt, 1)["input_ids"]
    static = {"cache_implementation": "static"} if isinstance(config, LlamaConfig) and not toy else {}

    def run(new: int) -> None:
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **static,
            )
        if out.shape[1] < new:
            raise SystemExit(f"{out.shape[1]} tokens instead of {new}")

    count = 1 if toy else 3
    # The difference of two lengths leaves the prompt out.
    both = [spread(_timed(functools.partial(run, new), warm=1 if toy else 2, count=count)) for new in (short, long)]
    seconds = (both[1]["median"] - both[0]["median"]) / (long - short)
    if toy:  # a few tokens of a toy differ by less than the noise
        seconds = both[1]["median"] / long
    if seconds <= 0:
        raise SystemExit(f"{long} tokens took no longer than {short}: too noisy to say anything")
    return {"seconds": {"median": seconds}, "rate": 1 / seconds}


def _timed(step: Callable[[], Any], *, warm: int, count: int) -> list[float]:
    times = []
    for _ in range(warm + count):
        before = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return times[warm:]


def main() -> None:
    """Does one thing and prints its result as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["export", "train", "decode"])
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = shape(arguments.shape, toy=arguments.toy)
    if arguments.what == "export":
        result = export(config, arguments.folder)
    else:
        result = {"train": train, "decode": decode}[arguments.what](config, toy=arguments.toy)
    print(json.dumps({**result, "torch": torch.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
