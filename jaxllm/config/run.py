"""Every setting of a run, as frozen dataclasses whose constructors refuse wrong values.

One YAML file is one `RunConfig`; `jaxllm.config.file` reads and writes it. A declaration checks its own value. Each
`__post_init__` checks several settings together, and that of `RunConfig` several sections, before anything is compiled.
"""

import re
from dataclasses import field
from typing import Annotated, Literal

from jaxllm.config.model import ModelConfig, Objective
from jaxllm.config.setting import above, at_least, at_most, below, positive, require, settings

Float = Literal["float32", "bfloat16", "float16"]
# Computations with a dtype that may differ from `precision.compute`, see `jaxllm.models.layers.Islands`.
Island = Literal["norms", "softmax", "rope", "relative_bias", "mlp_output", "residual", "logits"]
UpdateRule = Literal["adamw", "adamw_rms", "adafactor", "muon"]
Tracker = Literal["tensorboard", "wandb"]
Schedule = Literal["cosine", "wsd", "inverse_sqrt", "constant"]


@settings
class PrecisionConfig:
    """Mixed precision: float32 master weights, a compute dtype, and the loss scale float16 needs (arXiv 1710.03740)."""

    compute: Annotated[Float, "dtype of activations and matmul inputs; parameters and losses stay float32"] = "float32"
    islands: Annotated[
        dict[Island, Float], "dtypes of single islands, e.g. {softmax: bfloat16}, see docs/mixed_precision.md"
    ] = field(default_factory=dict)
    loss_scale: Annotated[Literal["none", "static", "dynamic"], "kind of loss scale; float16 needs one"] = "none"
    initial_scale: Annotated[float, positive, "first value of the loss scale"] = 65536.0
    growth_interval: Annotated[int, at_least(1), "finite steps in a row after which a dynamic scale doubles"] = 2000
    min_scale: Annotated[float, positive, "floor; an overflow at the floor counts towards stopping the run"] = 1.0
    max_scale: Annotated[float, positive, "ceiling of a dynamic scale"] = 2.0**24
    hysteresis: Annotated[int, at_least(1), "overflows in a row before a dynamic scale is halved"] = 1
    max_overflows: Annotated[int, at_least(1), "overflows in a row at the floor that stop the run"] = 20

    def __post_init__(self) -> None:
        message = "float16 gradients underflow without loss scaling; set precision.loss_scale: dynamic"
        require(self.compute != "float16" or self.loss_scale != "none", message)
        low, first, high = self.min_scale, self.initial_scale, self.max_scale
        message = f"initial_scale {first} must be between min_scale {low} and max_scale {high}"
        require(low <= first <= high, message)
        rope = self.islands.get("rope", "float32")
        reason = "16 bits give neighbouring positions the same angle (float16 above 2048, bfloat16 above 256)"
        require(rope == "float32", f"islands.rope must be float32, got {rope}: {reason}")


@settings
class OptimizerConfig:
    """Update rule and learning-rate schedule."""

    name: Annotated[
        UpdateRule,
        "update rule; adamw_rms is nanoT5's, muon updates the matrices of the layers",
    ] = "adamw"
    learning_rate: Annotated[float, positive, "peak of the schedule"] = 3e-4
    schedule: Annotated[Schedule, "after a linear warm-up; wsd is stable, then decays linearly"] = "cosine"
    warmup_steps: Annotated[int, at_least(0), "steps of linear warm-up; a shorter run shortens warm-up and decay"] = 0
    decay_steps: Annotated[int, at_least(0), "wsd: steps of the final linear decay"] = 0
    min_lr_ratio: Annotated[float, at_least(0), at_most(1), "floor of cosine and wsd, as a fraction of the peak"] = 0.1
    rate_factors: Annotated[
        dict[str, float],
        "factors of the learning rate by a name in a parameter's path, e.g. {embed: 0.1}",
    ] = field(default_factory=dict)
    momentum: Annotated[float, at_least(0), below(1), "muon: decay of the momentum of the layers' matrices"] = 0.95
    b1: Annotated[float, at_least(0), below(1), "decay of the first moment"] = 0.9
    b2: Annotated[float, at_least(0), below(1), "decay of the second moment"] = 0.95
    eps: Annotated[float, positive, "added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, at_least(0), "decoupled, on matrices only (no norm, bias or relative bias)"] = 0.1
    clip_norm: Annotated[float | None, positive, "largest global norm of the gradient; null never clips"] = 1.0
    ema: Annotated[
        float | None, at_least(0), below(1), "decay of an average of the parameters, which is evaluated; null has none"
    ] = None
    moment_dtype: Annotated[Literal["float32", "bfloat16"], "dtype of the first moment"] = "float32"


@settings
class DataConfig:
    """Where text comes from and how it becomes token arrays."""

    source: Annotated[str, "stdlib (embedded), files (with path) or any TFDS name such as wiki40b/en"] = "stdlib"
    path: Annotated[str | None, "file or folder of .txt, .jsonl (.gz, .zst) or .parquet, for source files"] = None
    text_key: Annotated[str, "field that holds the text in .jsonl, .parquet and TFDS records"] = "text"
    target_key: Annotated[str | None, "field that holds the answer, for the objective seq2seq"] = None
    validation_fraction: Annotated[float, above(0), at_most(0.5), "documents held out by content hash"] = 0.05
    validation: Annotated[
        dict[str, str],
        "files or folders by name, evaluated instead of held-out documents; the first decides the best checkpoint",
    ] = field(default_factory=dict)
    on_bad_text: Annotated[Literal["stop", "skip"], "stop or skip at a document that is not UTF-8"] = "stop"
    tokenizer: Annotated[
        str, "train (byte-level BPE), a tokenizer.json, a SentencePiece .model, or a folder that has one"
    ] = "train"
    sequence_length: Annotated[int, at_least(2), "tokens in a row (causal), or in an encoder row"] = 256
    target_length: Annotated[
        int | None, at_least(2), "tokens in a decoder row; null, for span corruption, fits sequence_length"
    ] = None
    example_length: Annotated[
        int | None, at_least(2), "encoder-decoder: tokens of an example; null fills a row, less packs several"
    ] = None
    too_long: Annotated[
        Literal["stop", "truncate"], "for a seq2seq pair longer than a row: stop, or truncate all but its end"
    ] = "stop"
    document_mask: Annotated[bool, "tokens attend within their document; false is cheaper on GPUs"] = True
    objective: Annotated[Objective, "what the model learns to predict"] = "causal"
    noise_density: Annotated[float, above(0), below(1), "fraction of the tokens that span corruption masks"] = 0.15
    mean_span_length: Annotated[float, at_least(1), "mean length of a masked span"] = 3.0
    workers: Annotated[
        int,
        at_least(0),
        "tokenising processes; 0 uses threads. Their number changes no batch. They import your script: guard its "
        'entry by `if __name__ == "__main__":`',
    ] = 0
    streams: Annotated[int, at_least(1), "parts of the corpus, each read on its own; see docs/cluster.md"] = 1
    cache_dir: Annotated[str | None, "where prepared datasets are kept; null keeps them in the run folder"] = None

    def __post_init__(self) -> None:
        require(bool(self.source), "source is empty; use stdlib, files or a TFDS name")
        found = f"got source {self.source!r} and path {self.path!r}"
        message = f"source: files needs path, and no other source takes one (data.path=null); {found}"
        require((self.source == "files") == (self.path is not None), message)
        wrong = [name for name, path in self.validation.items() if not (re.fullmatch(r"[\w-]+", name) and path)]
        message = f"validation needs a path for each name, and names of letters, digits, _ and -; got {wrong}"
        require(not wrong, message)
        message = f"document_mask: false needs objective causal, got {self.objective}: its examples must not mix"
        require(self.document_mask or self.objective == "causal", message)
        found = f"got objective {self.objective!r} and target_key {self.target_key!r}"
        message = f"objective: seq2seq needs target_key, and no other objective takes one; {found}"
        require((self.objective == "seq2seq") == (self.target_key is not None), message)


@settings
class TrainingConfig:
    """Length of the run, its batches, and when it logs, evaluates and saves."""

    run_dir: Annotated[str, "folder of config, tokenizer, checkpoints, metrics, curve and sample"] = "runs/default"
    steps: Annotated[int, at_least(1), "optimizer steps"] = 1000
    batch_size: Annotated[int, at_least(1), "rows per optimizer step, over all microbatches"] = 8
    accumulation: Annotated[int, at_least(1), "microbatches per optimizer step; divides batch_size"] = 1
    seed: Annotated[int, at_least(0), "seed of parameters, dropout and data order"] = 0
    init_from: Annotated[str | None, "run folder or Hugging Face directory to take initial parameters from"] = None
    branch_from: Annotated[
        str | None, "run folder whose state this run begins with: RUN@STEP, or RUN for its newest checkpoint"
    ] = None
    stop_after: Annotated[str | None, "wall time of one start, e.g. 11h30m, after which it saves and leaves"] = None
    log_every: Annotated[int, at_least(1), "steps between rows of metrics.jsonl; a row is the mean over them"] = 10
    eval_every: Annotated[int, at_least(1), "steps between evaluations on the validation split"] = 100
    eval_batches: Annotated[int, at_least(1), "batches of one evaluation"] = 16
    save_every: Annotated[int, at_least(1), "steps between checkpoints"] = 100
    save_every_minutes: Annotated[float | None, positive, "minutes after which a step is saved; null sets no limit"] = (
        None
    )
    keep: Annotated[int, at_least(1), "newest checkpoints kept, in addition to the best"] = 2
    trackers: Annotated[
        tuple[Tracker, ...], "programs that also get the rows of metrics.jsonl, such as [tensorboard, wandb]"
    ] = ()
    norms_every: Annotated[int, at_least(0), "steps between norms by parameter group, see docs/metrics.md; 0 never"] = 0
    profile: Annotated[
        tuple[int, ...] | None, "first and last step of a jax.profiler trace, such as [20, 25]; null makes none"
    ] = None
    z_loss: Annotated[float, at_least(0), "weight of logsumexp(logits) ** 2, against drift (arXiv 2204.02311)"] = 0.0
    loss_chunk: Annotated[int, at_least(1), "rows of logits that exist at once in the vocabulary loss"] = 1024
    sample_prompt: Annotated[str, "prompt of the text sample written at the end"] = ""
    sample_tokens: Annotated[int, at_least(0), "length of that sample; 0 writes none"] = 128
    compilation_cache: Annotated[str | None, "folder of JAX's persistent compilation cache; null uses none"] = None

    def __post_init__(self) -> None:
        message = f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
        require(self.batch_size % self.accumulation == 0, message)
        message = "init_from and branch_from both name a beginning; keep one of them"
        require(self.init_from is None or self.branch_from is None, message)
        seconds_of(self.stop_after)
        window = self.profile or (1, 1)
        message = f"profile must be null or [first, last] with 1 <= first <= last <= steps {self.steps}, got {window}"
        require(len(window) == 2 and 1 <= window[0] <= window[1] <= self.steps, message)
        require(len(set(self.trackers)) == len(self.trackers), f"trackers has a name twice: {', '.join(self.trackers)}")


def seconds_of(duration: str | None) -> float:
    """Seconds of a duration such as 11h30m, 45m or 90s; infinity for None.

    >>> seconds_of("11h30m"), seconds_of("90s")
    (41400.0, 90.0)
    """
    if duration is None:
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = float(hours * 3600 + minutes * 60 + seconds)
    require(total > 0, f"stop_after must be a duration such as 11h30m, 45m or 90s, got {duration!r}")
    return total


@settings
class ShardingConfig:
    """Layout over several devices; rows of a batch are spread over all."""

    fsdp: Annotated[
        int | None, at_least(1), "devices that share one copy of parameters and moments; null takes those of a node"
    ] = None


@settings
class RunConfig:
    """One complete run."""

    model: Annotated[ModelConfig, "architecture, by family"]
    precision: Annotated[PrecisionConfig, "dtypes and loss scale"] = field(default_factory=PrecisionConfig)
    optimizer: Annotated[OptimizerConfig, "update rule and schedule"] = field(default_factory=OptimizerConfig)
    data: Annotated[DataConfig, "source, tokenizer and objective"] = field(default_factory=DataConfig)
    training: Annotated[TrainingConfig, "length, cadence and output folder"] = field(default_factory=TrainingConfig)
    sharding: Annotated[ShardingConfig, "layout over several devices"] = field(default_factory=ShardingConfig)

    def __post_init__(self) -> None:
        self._check_model_fits()
        self._check_lengths()
        message = f"training.init_from needs its tokenizer; set data.tokenizer={self.training.init_from}"
        require(self.training.init_from is None or self.data.tokenizer != "train", message)
        rows, streams = self.training.batch_size, self.data.streams
        require(rows % streams == 0, f"data.streams {streams} does not divide training.batch_size {rows}")
        message = "schedule wsd needs optimizer.decay_steps, e.g. a tenth of training.steps"
        require(self.optimizer.schedule != "wsd" or self.optimizer.decay_steps > 0, message)

    def _check_model_fits(self) -> None:
        model, objective, islands = self.model, self.data.objective, self.precision.islands
        *others, last = model.objectives
        known = f"{', '.join(others)} or {last}" if others else last
        reason = "; a decoder's attention is causal over the whole row" if objective == "prefix_lm" else ""
        message = f"data.objective {objective!r} does not fit model.family {model.family!r}"
        require(objective in model.objectives, f"{message}; use {known}{reason}")
        absent = ", ".join(sorted(model.absent_islands & islands.keys()))
        message = f"model.family {model.family!r} has no such island: {absent}"
        require(not absent, f"{message}; remove it from precision.islands")
        softmax = islands.get("softmax", "float32")
        message = f"model.attention {model.attention!r} computes its softmax in float32"
        fix = f"use attention: reference with precision.islands softmax: {softmax}"
        require(softmax == "float32" or model.attention in ("auto", "reference"), f"{message}; {fix}")

    def _check_lengths(self) -> None:
        model, data, training = self.model, self.data, self.training
        derived = not model.encoder_decoder or data.objective == "span_corruption"
        require(
            derived or data.target_length is not None,
            f"objective {data.objective} on an encoder-decoder needs data.target_length, e.g. 114",
        )
        tokens = training.batch_size // training.accumulation * data.sequence_length
        message = f"training.batch_size in rows of data.sequence_length makes microbatches of {tokens} tokens"
        require(tokens < 2**31, f"{message}, over int32's range; lower it or raise training.accumulation")
        message = f"data.sequence_length {data.sequence_length} exceeds model.max_length {model.context}"
        fits = model.context is None or data.sequence_length <= model.context
        require(fits, f"{message}; shorten the rows or raise max_length")
