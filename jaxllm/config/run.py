"""Every setting of a run, as frozen dataclasses that cannot be constructed wrong.

One YAML file is one `RunConfig`; `jaxllm.config.file` reads and writes it. A declaration checks its own value, each
`__post_init__` what crosses settings, and that of `RunConfig` what crosses sections, so that a bad value is refused
before anything is compiled. Models receive only their own config (`jaxllm.config.model`). Out of scope: reading files,
building models or optimizers.
"""

from dataclasses import field
from typing import Annotated, Literal

from jaxllm.config.model import ModelConfig, Objective
from jaxllm.config.setting import above, at_least, at_most, below, positive, require, settings

Float = Literal["float32", "bfloat16", "float16"]
# What may be computed in another dtype than `precision.compute`; `jaxllm.models.layers.Islands` describes each.
Island = Literal["norms", "softmax", "rope", "relative_bias", "mlp_output", "residual", "logits"]


@settings
class PrecisionConfig:
    """Mixed precision: float32 master weights, a compute dtype, and the loss scale float16 needs (arXiv 1710.03740)."""

    compute: Annotated[Float, "dtype of activations and matmul inputs; parameters and losses stay float32"] = "float32"
    islands: Annotated[
        dict[Island, Float],
        "dtypes of single islands, e.g. {softmax: bfloat16}; others keep theirs, see docs/mixed_precision.md",
    ] = field(default_factory=dict)
    loss_scale: Annotated[Literal["none", "static", "dynamic"], "kind of loss scale; float16 needs one"] = "none"
    initial_scale: Annotated[float, positive, "first value of the loss scale"] = 65536.0
    growth_interval: Annotated[int, at_least(1), "finite steps in a row after which a dynamic scale doubles"] = 2000
    min_scale: Annotated[float, positive, "floor; an overflow at the floor counts towards stopping the run"] = 1.0
    max_scale: Annotated[float, positive, "ceiling of a dynamic scale"] = 2.0**24
    hysteresis: Annotated[int, at_least(1), "overflows in a row before a dynamic scale is halved"] = 1
    max_overflows: Annotated[int, at_least(1), "overflows in a row at the floor that stop the run"] = 20

    def __post_init__(self) -> None:
        require(
            self.compute != "float16" or self.loss_scale != "none",
            "float16 gradients underflow without loss scaling; set precision.loss_scale: dynamic",
        )
        require(
            self.min_scale <= self.initial_scale <= self.max_scale,
            f"initial_scale {self.initial_scale} must be between min_scale {self.min_scale} "
            f"and max_scale {self.max_scale}",
        )
        require(
            self.islands.get("rope", "float32") == "float32",
            f"islands.rope must be float32, got {self.islands.get('rope')}: 16 bits cannot tell long positions apart "
            f"(float16 above 2048, bfloat16 above 256), so neighbouring positions would get the same angle",
        )


@settings
class OptimizerConfig:
    """Update rule and learning-rate schedule."""

    name: Annotated[
        Literal["adamw", "adamw_rms", "adafactor"],
        "adamw (1711.05101), adamw_rms (AdamW scaled by each tensor's RMS, nanoT5) or adafactor (1804.04235)",
    ] = "adamw"
    learning_rate: Annotated[float, positive, "peak of the schedule"] = 3e-4
    schedule: Annotated[
        Literal["cosine", "wsd", "inverse_sqrt", "constant"],
        "cosine, wsd (stable, then linear decay), inverse_sqrt or constant; all after a linear warm-up",
    ] = "cosine"
    warmup_steps: Annotated[int, at_least(0), "steps of linear warm-up"] = 0
    decay_steps: Annotated[int, at_least(0), "wsd: steps of the final linear decay"] = 0
    min_lr_ratio: Annotated[float, at_least(0), at_most(1), "floor of cosine and wsd, as a fraction of the peak"] = 0.1
    b1: Annotated[float, at_least(0), below(1), "decay of the first moment"] = 0.9
    b2: Annotated[float, at_least(0), below(1), "decay of the second moment"] = 0.95
    eps: Annotated[float, positive, "added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, at_least(0), "decoupled, on matrices only (no norm, bias or relative bias)"] = 0.1
    clip_norm: Annotated[float | None, positive, "largest global norm of the gradient; null never clips"] = 1.0
    moment_dtype: Annotated[Literal["float32", "bfloat16"], "dtype of the first moment"] = "float32"


@settings
class DataConfig:
    """Where text comes from and how it becomes token arrays."""

    source: Annotated[str, "stdlib (embedded), files (with path) or any TFDS name such as wiki40b/en"] = "stdlib"
    path: Annotated[str | None, "file or folder of .txt, .jsonl (.gz, .zst) or .parquet, for source files"] = None
    text_key: Annotated[str, "field that holds the text in .jsonl, .parquet and TFDS records"] = "text"
    target_key: Annotated[str | None, "field that holds the answer, for the objective seq2seq"] = None
    validation_fraction: Annotated[
        float, above(0), at_most(0.5), "fraction of the documents held out, by a hash of their content"
    ] = 0.05
    on_bad_text: Annotated[
        Literal["stop", "skip"], "for a document that is not UTF-8: stop, or skip it (counted and named)"
    ] = "stop"
    tokenizer: Annotated[
        str, "train (byte-level BPE on the training split) or a tokenizer.json or SentencePiece .model file"
    ] = "train"
    sequence_length: Annotated[int, at_least(2), "tokens in a row (causal), or in an encoder row"] = 256
    target_length: Annotated[
        int | None,
        at_least(2),
        "tokens in a decoder row; null, for span corruption, is what exactly fits sequence_length",
    ] = None
    example_length: Annotated[
        int | None,
        at_least(2),
        "tokens of text in one example of an encoder-decoder; null takes as many as a row can hold, less packs several "
        "into a row",
    ] = None
    too_long: Annotated[
        Literal["stop", "truncate"],
        "for a seq2seq pair that does not fit a row: stop, or truncate it (its end stays an end)",
    ] = "stop"
    document_mask: Annotated[
        bool,
        "tokens attend to their own document only; false lets all documents of a causal row see each other, which "
        "spares a GPU's fused attention the wider heads that tell documents apart",
    ] = True
    objective: Annotated[Objective, "what the model learns to predict"] = "causal"
    noise_density: Annotated[float, above(0), below(1), "fraction of the tokens that span corruption masks"] = 0.15
    mean_span_length: Annotated[float, at_least(1), "mean length of a masked span"] = 3.0
    workers: Annotated[
        int,
        at_least(0),
        "processes that tokenise; 0 tokenises in threads of the main process. They change no batch, and a resume may "
        "use another number. With workers, guard your own script's entry by "
        '`if __name__ == "__main__":`, because the processes import it',
    ] = 0
    cache_dir: Annotated[str | None, "where prepared datasets are kept; null keeps them in the run folder"] = None

    def __post_init__(self) -> None:
        require(bool(self.source), "source is empty; use stdlib, files or a TFDS name")
        require(
            (self.source == "files") == (self.path is not None),
            f"source: files needs path, and no other source takes one; got source {self.source!r} and path "
            f"{self.path!r}",
        )
        require(
            self.document_mask or self.objective == "causal",
            f"document_mask: false is for objective causal; got {self.objective}, whose examples must not mix",
        )
        require(
            (self.objective == "seq2seq") == (self.target_key is not None),
            f"objective: seq2seq needs target_key, and no other objective takes one; got objective "
            f"{self.objective!r} and target_key {self.target_key!r}",
        )


@settings
class TrainingConfig:
    """Length of the run, its batches, and when it logs, evaluates and saves."""

    run_dir: Annotated[str, "folder of config, tokenizer, checkpoints, metrics, curve and sample"] = "runs/default"
    steps: Annotated[int, at_least(1), "optimizer steps"] = 1000
    batch_size: Annotated[int, at_least(1), "rows per optimizer step, over all microbatches"] = 8
    accumulation: Annotated[int, at_least(1), "microbatches per optimizer step; divides batch_size"] = 1
    seed: Annotated[int, at_least(0), "seed of parameters, dropout and data order"] = 0
    init_from: Annotated[str | None, "run folder or Hugging Face directory to take initial parameters from"] = None
    log_every: Annotated[int, at_least(1), "steps between lines of metrics.jsonl"] = 10
    eval_every: Annotated[int, at_least(1), "steps between evaluations on the validation split"] = 100
    eval_batches: Annotated[int, at_least(1), "batches of one evaluation"] = 16
    save_every: Annotated[int, at_least(1), "steps between checkpoints"] = 100
    keep: Annotated[int, at_least(1), "newest checkpoints kept, in addition to the best"] = 2
    z_loss: Annotated[float, at_least(0), "weight of logsumexp(logits) ** 2, against drift (arXiv 2204.02311)"] = 0.0
    loss_chunk: Annotated[int, at_least(1), "rows of logits that exist at once in the vocabulary loss"] = 1024
    sample_prompt: Annotated[str, "prompt of the text sample written at the end"] = ""
    sample_tokens: Annotated[int, at_least(0), "length of that sample; 0 writes none"] = 128
    compilation_cache: Annotated[str | None, "folder of JAX's persistent compilation cache; null uses none"] = None

    def __post_init__(self) -> None:
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}",
        )


@settings
class RunConfig:
    """One complete run."""

    model: Annotated[ModelConfig, "architecture, by family"]
    precision: Annotated[PrecisionConfig, "dtypes and loss scale"] = field(default_factory=PrecisionConfig)
    optimizer: Annotated[OptimizerConfig, "update rule and schedule"] = field(default_factory=OptimizerConfig)
    data: Annotated[DataConfig, "source, tokenizer and objective"] = field(default_factory=DataConfig)
    training: Annotated[TrainingConfig, "length, cadence and output folder"] = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        self._check_model_fits()
        self._check_lengths()
        require(
            self.training.init_from is None or self.data.tokenizer != "train",
            "the parameters of training.init_from belong to one tokenizer; set data.tokenizer to its file, "
            "e.g. the tokenizer.json in that folder",
        )
        optimizer, steps = self.optimizer, self.training.steps
        require(
            optimizer.warmup_steps + optimizer.decay_steps <= steps,
            f"optimizer.warmup_steps {optimizer.warmup_steps} + decay_steps {optimizer.decay_steps} exceed "
            f"training.steps {steps}",
        )
        require(
            optimizer.schedule != "wsd" or optimizer.decay_steps > 0,
            "schedule wsd needs optimizer.decay_steps, e.g. a tenth of training.steps",
        )

    def _check_model_fits(self) -> None:
        model, objective, islands = self.model, self.data.objective, self.precision.islands
        *others, last = model.objectives
        known = f"{', '.join(others)} or {last}" if others else last
        reason = "; a decoder's attention is causal over the whole row" if objective == "prefix_lm" else ""
        require(
            objective in model.objectives,
            f"data.objective {objective!r} does not fit model.family {model.family!r}; use {known}{reason}",
        )
        absent = sorted(model.absent_islands & islands.keys())
        require(
            not absent,
            f"model.family {model.family!r} has no such island: {', '.join(absent)}; remove it from precision.islands",
        )
        require(
            islands.get("softmax", "float32") == "float32" or model.attention in ("auto", "reference"),
            f"model.attention {model.attention!r} computes its softmax in float32; use attention: reference with "
            f"precision.islands softmax: {islands.get('softmax')}",
        )

    def _check_lengths(self) -> None:
        model, data, training = self.model, self.data, self.training
        require(
            not model.encoder_decoder or data.objective == "span_corruption" or data.target_length is not None,
            f"objective {data.objective} on an encoder-decoder needs data.target_length, e.g. 114",
        )
        tokens = training.batch_size // training.accumulation * data.sequence_length
        require(
            tokens < 2**31,
            f"training.batch_size {training.batch_size} makes microbatches of {tokens} tokens, more than an int32 "
            f"can count; lower it or raise training.accumulation",
        )
        require(
            model.context is None or data.sequence_length <= model.context,
            f"data.sequence_length {data.sequence_length} exceeds model.max_length {model.context}; "
            f"shorten the rows or raise max_length",
        )
