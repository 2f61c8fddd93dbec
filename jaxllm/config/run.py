"""Every setting of a run, as frozen dataclasses that cannot be constructed wrong.

One YAML file is one `RunConfig`; `jaxllm.config.file` reads and writes it. Each class checks its own invariants in
`__post_init__`, and `RunConfig` those that cross sections, so that a bad value is refused before anything is
compiled. Models receive only their own config (`jaxllm.config.model`). Out of scope: reading files, building models or
optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxllm.config.model import (
    STRICT,
    ModelConfig,
    Objective,
    fraction,
    positive,
    require,
    typed,
)

Float = Literal["float32", "bfloat16", "float16"]
# What may be computed in another dtype than `precision.compute`; `jaxllm.models.layers.Islands` says what each is.
Island = Literal["norms", "softmax", "rope", "relative_bias", "mlp_output", "residual", "logits"]


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Mixed precision: float32 master parameters, a compute dtype, and the loss scale float16 needs (arXiv 1710.03740).

    Attributes:
        compute: dtype of activations and matmul inputs; parameters, moments and losses stay float32.
        islands: dtypes of single islands, e.g. {softmax: bfloat16}; others keep theirs, see docs/mixed_precision.md.
        loss_scale: none, static or dynamic; float16 needs one of the last two.
        initial_scale: first value of the loss scale.
        growth_interval: finite steps in a row after which a dynamic scale doubles.
        min_scale: floor; an overflow at the floor counts towards stopping the run.
        max_scale: ceiling of a dynamic scale.
        hysteresis: overflows in a row before a dynamic scale is halved.
        retries: recompute an overflowed batch with a smaller scale up to this many times instead of dropping it.
        max_overflows: overflows in a row at the floor that stop the run.
    """

    __pydantic_config__ = STRICT

    compute: Float = "float32"
    islands: dict[Island, Float] = field(default_factory=dict)
    loss_scale: Literal["none", "static", "dynamic"] = "none"
    initial_scale: float = 65536.0
    growth_interval: int = 2000
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    hysteresis: int = 1
    retries: int = 0
    max_overflows: int = 20

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "initial_scale", "growth_interval", "min_scale", "max_scale", "hysteresis", "max_overflows")
        require(
            self.compute != "float16" or self.loss_scale != "none",
            "float16 gradients underflow without loss scaling; set precision.loss_scale: dynamic",
        )
        require(
            self.min_scale <= self.initial_scale <= self.max_scale,
            f"initial_scale {self.initial_scale} must lie between min_scale {self.min_scale} "
            f"and max_scale {self.max_scale}",
        )
        require(
            self.islands.get("rope", "float32") == "float32",
            f"islands.rope must be float32, got {self.islands.get('rope')}: in 16 bits position 2049 is no number of "
            f"its own (in bfloat16 not even 257), and neighbours would share an angle",
        )
        require(self.retries >= 0, f"retries must not be negative, got {self.retries}")
        require(
            self.retries == 0 or self.loss_scale == "dynamic",
            "retries needs a scale that can shrink; set precision.loss_scale: dynamic or retries: 0",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule and learning-rate schedule.

    Attributes:
        name: adamw (1711.05101), adamw_rms (AdamW scaled by each tensor's RMS, nanoT5) or adafactor (1804.04235).
        learning_rate: peak of the schedule.
        schedule: cosine, wsd (stable, then linear decay), inverse_sqrt or constant; all after a linear warm-up.
        warmup_steps: steps of linear warm-up.
        decay_steps: wsd, steps of the final linear decay.
        min_lr_ratio: floor of cosine and wsd as a part of the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on matrices only (norms, biases and relative bias are spared).
        clip_norm: largest global norm of the gradient; null never clips.
        moment_dtype: dtype of the first moment.
    """

    __pydantic_config__ = STRICT

    name: Literal["adamw", "adamw_rms", "adafactor"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "learning_rate", "eps")
        fraction(self, "b1", "b2")
        for name in ("warmup_steps", "decay_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must lie in [0, 1], got {self.min_lr_ratio}")
        if self.clip_norm is not None:
            require(self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}; null never clips")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes token arrays.

    Attributes:
        source: stdlib (embedded), files (with path) or any TFDS name such as wiki40b/en.
        path: file or folder of .txt, .jsonl (.gz, .zst) or .parquet, for source files.
        text_key: field that holds the text in .jsonl, .parquet and TFDS records.
        target_key: field that holds the answer, for the objective seq2seq.
        validation_fraction: part of the documents held out, by a hash of their content.
        on_bad_text: what a document that is not UTF-8 does: stop or skip (counted and named).
        tokenizer: train (byte-level BPE on the training split) or a tokenizer.json or SentencePiece .model file.
        sequence_length: tokens in a row (causal), or in an encoder row.
        target_length: tokens in a decoder row; null, for span corruption, is what exactly fits sequence_length.
        example_length: tokens of text in one example of an encoder-decoder; null takes as many as a row can hold,
            less packs several into a row.
        too_long: what a pair of seq2seq that does not fit a row does: stop or truncate (its end stays an end).
        document_mask: tokens attend to their own document only; false lets all documents of a causal row see each
            other, which spares a GPU's fused attention the wider heads that tell documents apart.
        objective: causal, prefix_lm, span_corruption, ul2 or seq2seq.
        noise_density: part of the tokens that span corruption hides.
        mean_span_length: mean length of a masked span.
        workers: processes that tokenise; 0 tokenises in threads of the main process. They change no batch, and the
            number may differ at a resume. A script of your own then needs `if __name__ == "__main__":` around what it
            does, since they import it.
        cache_dir: where prepared datasets are kept; null keeps them in the run folder.
    """

    __pydantic_config__ = STRICT

    source: str = "stdlib"
    path: str | None = None
    text_key: str = "text"
    target_key: str | None = None
    validation_fraction: float = 0.05
    on_bad_text: Literal["stop", "skip"] = "stop"
    tokenizer: str = "train"
    sequence_length: int = 256
    target_length: int | None = None
    example_length: int | None = None
    too_long: Literal["stop", "truncate"] = "stop"
    document_mask: bool = True
    objective: Objective = "causal"
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    workers: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        typed(self)
        require(bool(self.source), "source is empty; use stdlib, files or a TFDS name")
        require(
            (self.source == "files") == (self.path is not None),
            f"path goes with source: files and only with it, got source {self.source!r} and path {self.path!r}",
        )
        require(
            0 < self.validation_fraction <= 0.5,
            f"validation_fraction must lie in (0, 0.5], got {self.validation_fraction}",
        )
        require(self.sequence_length >= 2, f"sequence_length must be at least 2, got {self.sequence_length}")
        if self.target_length is not None:
            require(self.target_length >= 2, f"target_length must be at least 2, got {self.target_length}")
        if self.example_length is not None:
            require(self.example_length >= 2, f"example_length must be at least 2, got {self.example_length}")
        require(0 < self.noise_density < 1, f"noise_density must lie in (0, 1), got {self.noise_density}")
        require(self.mean_span_length >= 1, f"mean_span_length must be at least 1, got {self.mean_span_length}")
        require(self.workers >= 0, f"workers must not be negative, got {self.workers}")
        require(
            self.document_mask or self.objective == "causal",
            f"document_mask: false is for objective causal; got {self.objective}, whose examples must not mix",
        )
        require(
            (self.objective == "seq2seq") == (self.target_key is not None),
            f"target_key goes with objective: seq2seq and only with it, got objective {self.objective!r} and "
            f"target_key {self.target_key!r}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of the run, its batches, and when it logs, evaluates and saves.

    Attributes:
        run_dir: folder of the run: config, tokenizer, checkpoints, metrics, curve, sample.
        steps: optimizer steps.
        batch_size: rows per optimizer step, over all microbatches.
        accumulation: microbatches per optimizer step; divides batch_size.
        seed: of parameters, dropout and data order.
        init_from: run folder or Hugging Face directory to take initial parameters from.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations on the validation split.
        eval_batches: batches of one evaluation.
        save_every: steps between checkpoints.
        keep: newest checkpoints kept, besides the best.
        z_loss: weight of logsumexp(logits) ** 2, which keeps logits from drifting (2204.02311).
        loss_chunk: rows of logits that exist at once in the vocabulary loss.
        sample_prompt: prompt of the text sample written at the end.
        sample_tokens: length of that sample; 0 writes none.
        compilation_cache: folder of JAX's persistent compilation cache; null uses none.
    """

    __pydantic_config__ = STRICT

    run_dir: str = "runs/default"
    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    init_from: str | None = None
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 16
    save_every: int = 100
    keep: int = 2
    z_loss: float = 0.0
    loss_chunk: int = 1024
    sample_prompt: str = ""
    sample_tokens: int = 128
    compilation_cache: str | None = None

    def __post_init__(self) -> None:
        typed(self)
        counts = ("steps", "batch_size", "accumulation", "log_every", "eval_every", "eval_batches")
        positive(self, *counts, "save_every", "keep", "loss_chunk")
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}",
        )
        require(self.z_loss >= 0, f"z_loss must not be negative, got {self.z_loss}")
        require(self.sample_tokens >= 0, f"sample_tokens must not be negative, got {self.sample_tokens}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run.

    Attributes:
        model: architecture, by family.
        precision: dtypes and loss scale.
        optimizer: update rule and schedule.
        data: source, tokenizer and objective.
        training: length, cadence and output folder.
    """

    __pydantic_config__ = STRICT

    model: ModelConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        typed(self)
        model, data, islands = self.model, self.data, self.precision.islands
        optimizer, steps = self.optimizer, self.training.steps
        require(
            data.objective in model.objectives,
            f"data.objective {data.objective!r} does not fit model.family {model.family!r}; "
            f"use {' or '.join(filter(None, [', '.join(model.objectives[:-1]), model.objectives[-1]]))}"
            + ("; a decoder's attention has no prefix that sees both ways" if data.objective == "prefix_lm" else ""),
        )
        absent = sorted(model.absent_islands & islands.keys())
        require(
            not absent,
            f"model.family {model.family!r} has no such island: {', '.join(absent)}; remove it from precision.islands",
        )
        require(
            islands.get("softmax", "float32") == "float32" or model.attention in ("auto", "reference"),
            f"model.attention {model.attention!r} keeps its softmax in float32; use attention: reference with "
            f"precision.islands softmax: {islands.get('softmax')}",
        )
        require(
            not model.encoder_decoder or data.objective == "span_corruption" or data.target_length is not None,
            f"objective {data.objective} on an encoder-decoder needs data.target_length, e.g. 114",
        )
        tokens = self.training.batch_size // self.training.accumulation * data.sequence_length
        require(
            tokens < 2**31,
            f"training.batch_size {self.training.batch_size} makes microbatches of {tokens} tokens, more than an int32 "
            f"can count; lower it or raise training.accumulation",
        )
        require(
            model.context is None or data.sequence_length <= model.context,
            f"data.sequence_length {data.sequence_length} exceeds model.max_length {model.context}; "
            f"shorten the rows or raise max_length",
        )
        require(
            self.training.init_from is None or data.tokenizer != "train",
            "training.init_from brings parameters that know one tokenizer; set data.tokenizer to its file, "
            "e.g. the tokenizer.json in that folder",
        )
        require(
            optimizer.warmup_steps + optimizer.decay_steps <= steps,
            f"optimizer.warmup_steps {optimizer.warmup_steps} + decay_steps {optimizer.decay_steps} exceed "
            f"training.steps {steps}",
        )
        require(
            optimizer.schedule != "wsd" or optimizer.decay_steps > 0,
            "schedule wsd needs optimizer.decay_steps, e.g. a tenth of training.steps",
        )
