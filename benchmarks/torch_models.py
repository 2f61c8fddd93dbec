"""transformers on torch as an expert runs it: the models, train steps and decoders that the benchmarks compare with.

A train step compiles forward and loss as one function of static shapes, updates with fused AdamW, clips the gradient,
makes no cache and does not wait for the loss. A decoder is `generate` over a static cache, which transformers compiles,
or our loop around one compiled forward pass, with the greedy choice on the device.
"""

import functools
import inspect
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, EncoderDecoderCache, StaticCache

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.interop import llama, t5

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
Inputs = dict[str, torch.Tensor]


def model_of(
    source: LlamaConfig | T5Config | Path, *, dtype: torch.dtype = torch.float32, attention: str = "auto"
) -> Any:
    """The model of a shape, with random weights, or of a folder that `save_hf` wrote.

    Args:
        source: config or folder.
        dtype: of the weights.
        attention: `auto` is SDPA with torch's choice of a kernel; `flash`, `cudnn`, `efficient` and `math` are SDPA
            with that kernel alone; `flex_attention` is that one.
    """
    if attention in ("flash", "cudnn", "efficient", "math"):
        torch.backends.cuda.enable_flash_sdp(attention == "flash")
        torch.backends.cuda.enable_cudnn_sdp(attention == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(attention == "efficient")
        torch.backends.cuda.enable_math_sdp(attention == "math")
    options = {"dtype": dtype, "attn_implementation": attention if attention == "flex_attention" else "sdpa"}
    config = _config(source)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(DEVICE):
        if isinstance(source, Path):
            return kind.from_pretrained(source, **options).to(DEVICE)
        return kind.from_config(config, **options)


def _config(source: LlamaConfig | T5Config | Path) -> Any:
    if isinstance(source, Path):
        return AutoConfig.from_pretrained(source)
    raw = llama.write_config(source) if isinstance(source, LlamaConfig) else t5.write_config(source)
    return AutoConfig.for_model(**{"pad_token_id": None, **raw})


def inputs_of(arrays: list[Any]) -> Inputs:
    """Token arrays by the names of transformers' arguments: of the encoder (or of Llama), then of the decoder."""
    names = ("input_ids", "decoder_input_ids")
    return {name: torch.as_tensor(x, dtype=torch.long, device=DEVICE) for name, x in zip(names, arrays, strict=False)}


def train_step(
    model: Any, *, autocast: bool, mode: str | None = "default", chunk: int | None = None
) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    """A step from inputs and targets to the loss, which stays on the device.

    Args:
        model: in float32; updated in place.
        autocast: whether matmuls run in bfloat16.
        mode: of `torch.compile`; None runs eagerly.
        chunk: positions whose logits exist at a time, computed again in the backward pass; None is all at once.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = functools.partial(_whole_loss, model) if chunk is None else _chunked_loss(model, chunk)
    if mode is not None:
        loss_of = torch.compile(loss_of, mode=mode, dynamic=False)
    cast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast)

    def step(inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        with cast:
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _whole_loss(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _chunked_loss(model: Any, chunk: int) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    head, model.lm_head = model.lm_head, torch.nn.Identity()  # the model then returns what its head would receive

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    def loss_of(inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        hidden = model(**inputs, use_cache=False).logits.flatten(0, 1).split(chunk)
        total = torch.zeros((), device=DEVICE)
        for each, wanted in zip(hidden, targets.flatten().split(chunk), strict=True):
            total = total + checkpoint(part, each, wanted, use_reentrant=False)
        return total / targets.numel()

    return loss_of


def generator(model: Any, tokens: torch.Tensor, *, static: bool) -> Callable[[int], torch.Tensor]:
    """Greedy `generate` of transformers, as a function of the number of new tokens.

    With a static cache transformers compiles the forward pass of a token; otherwise the cache grows and nothing is
    compiled. Call it for the longest continuation first: a larger cache is compiled again.
    """
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = None, None, 0
    settings.decoder_start_token_id = 0
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(tokens)}
    if static:
        compile_config: Any = transformers.CompileConfig()
        compile_config._compile_all_devices = True  # on a CPU it would be left out
        options |= {"cache_implementation": "static", "compile_config": compile_config}
    skipped = 1 if model.config.is_encoder_decoder else tokens.shape[1]

    def run(new: int) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(tokens, max_new_tokens=new, **options)[:, skipped:]

    return run


def greedy_loop(model: Any, tokens: torch.Tensor, *, longest: int) -> Callable[[int], torch.Tensor]:
    """Greedy decoding without `generate`: a compiled token step over one static cache, replayed as a CUDA graph.

    Nothing waits for the device between two tokens. `longest` is the most new tokens of any call.
    """
    config, family = model.config.get_text_config(decoder=True), model.config.is_encoder_decoder
    prompt = tokens.shape[1]
    cache: Any = StaticCache(config=config, max_cache_len=longest + (0 if family else prompt))
    if family:
        cache = EncoderDecoderCache(cache, StaticCache(config=config, max_cache_len=prompt))
    # renamed after transformers 5.17
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    common = {name: cache, "use_cache": True}

    def forward(token: torch.Tensor, encoded: Any) -> torch.Tensor:
        inputs = {"decoder_input_ids": token, "encoder_outputs": encoded} if family else {"input_ids": token}
        return model(**inputs, **common).logits[:, -1:].argmax(-1)

    step = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run(new: int) -> torch.Tensor:
        cache.reset()
        with torch.no_grad():
            encoded = model.get_encoder()(tokens) if family else None
            token = forward(torch.zeros_like(tokens[:, :1]) if family else tokens, encoded)
            chosen = [token]
            for _ in range(new - 1):
                token = step(token, encoded).clone()  # the next replay overwrites what a CUDA graph returns
                chosen.append(token)
            return torch.cat(chosen, 1)

    return run


def timed(run: Callable[[], Any], *, warm: int, count: int, size: int = 1) -> list[float]:
    """Seconds of a run in each of `count` groups of `size`, between which the host waits for the device."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(count):
        synchronize()
        before = time.perf_counter()
        for _ in range(size):
            run()
        synchronize()
        times.append((time.perf_counter() - before) / size)
    return times


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def attention_kernels(run: Callable[[], Any]) -> list[str]:
    """Names of the attention operators and kernels in one run; empty where attention was compiled like all else."""
    with torch.profiler.profile() as profile:
        run()
        synchronize()
    name = re.compile(r"_scaled_dot_product_\w+|\w*(flash|fmha|cudnn_generated|flex)\w*")
    found = (name.search(event.key) for event in profile.key_averages())
    return sorted({match[0][:80] for match in found if match})
