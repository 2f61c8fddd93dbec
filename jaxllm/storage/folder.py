"""The folder of a run: what is in it, who may use it, and which config may continue the run in it.

config.yaml              the resolved config, written when nothing can refuse the run any more
tokenizer.json, .model   the run's tokenizer, and tokenizer_origin.json: what it was made from
data/                    the prepared corpus, unless data.cache_dir is set
checkpoints/STEP/        state, data position, and validation losses before it (`jaxllm.storage.checkpoint`)
checkpoints.damaged/     checkpoints that could not be read
metrics.jsonl            one row of numbers per line
tensorboard/, wandb/     what those trackers write, with wandb_id: the W&B run that a resume continues
profile/                 the trace of the steps of training.profile
sample.txt, loss.png     written after the last step
.lock                    locked by the process that trains
"""

import contextlib
import dataclasses
import enum
import fcntl
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxllm.config import DataConfig, RunConfig
from jaxllm.config.file import ConfigError, config_differences, dump_config, load_config
from jaxllm.data import DataError, tokenizer_choice
from jaxllm.data.durable import sync, write_whole
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_in
from jaxllm.data.tokenizer_choice import Choice, Kept, Origin, Refuse
from jaxllm.host import processes
from jaxllm.ops.backend import has_bfloat16
from jaxllm.training.optimizer import same_rates

_log = logging.getLogger(__name__)

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
TOKENIZER_ORIGIN = "tokenizer_origin.json"
DATA = "data"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
WANDB_ID = "wandb_id"
SAMPLE = "sample.txt"
CURVE = "loss.png"
_LOCK = ".lock"
HUGGING_FACE_CONFIG = "config.json"

# What may change between two starts of one run, because it does not affect the parameters, by section of the config.
_MAY_CHANGE = {
    "training": "run_dir log_every eval_every eval_batches save_every save_every_minutes stop_after keep "
    "sample_prompt sample_tokens compilation_cache trackers norms_every profile",
    "data": "cache_dir workers tokenizer",  # the folder keeps its own tokenizer, and takes no other
    "model": "layers remat attention",
    "sharding": "fsdp",
}
# Where a run came from, which may also differ between a run and its branch.
_BEGINNING = {"training": "init_from branch_from"}

# Settings of the learning rate, which may change as long as the rates of the steps that are done stay the same.
_RATES = {"training": "steps", "optimizer": "learning_rate schedule warmup_steps decay_steps min_lr_ratio"}


class RunFolderError(ConfigError):
    """A run folder that cannot be used; the message has the reason and the fix."""


class Kind(enum.Enum):
    """The kinds of folder that hold a model."""

    RUN = enum.auto()
    HUGGING_FACE = enum.auto()


def kind_of(path: str | Path) -> Kind | None:
    """The kind of a folder; None where it is neither."""
    folder = Path(path).expanduser()
    if (folder / CONFIG).is_file():
        return Kind.RUN
    return Kind.HUGGING_FACE if (folder / HUGGING_FACE_CONFIG).is_file() else None


def find_model(path: str | Path) -> tuple[Path, Kind, int | None]:
    """The folder of RUN, RUN@STEP or a Hugging Face directory, and the step; ConfigError where it is none of them."""
    folder, step = _run_and_step(path)
    kind = kind_of(folder)
    if kind is not None and (step is None or kind is Kind.RUN):
        return folder, kind, step
    raise ConfigError(f"{path} is neither a run folder (config.yaml) nor a Hugging Face directory (config.json)")


def _run_and_step(path: str | Path) -> tuple[Path, int | None]:
    """Folder and step of RUN or RUN@STEP; a run's folder may itself have a name with @ and a number at its end."""
    name, _, step = str(path).rpartition("@")
    if name and step.isdecimal() and kind_of(path) is None:
        return Path(name).expanduser(), int(step)
    return Path(path).expanduser(), None


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, whole or damaged, oldest first."""
    return sorted(int(item.name) for item in folder.glob("*") if item.name.isdecimal())


def has_begun(folder: Path) -> bool:
    """Whether the run of a folder has made a step."""
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    return (metrics.exists() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _holds_begun_run(folder: Path) -> bool:
    return (folder / CONFIG).exists() and has_begun(folder)


def continued(config: RunConfig, folder: Path | None = None) -> tuple[Path, int | None] | None:
    """Folder and step of the run that one in `folder` continues: itself, or `branch_point`; None for a new run."""
    folder = folder or Path(config.training.run_dir).expanduser()
    return (folder, None) if _holds_begun_run(folder) else branch_point(config)


def branch_point(config: RunConfig) -> tuple[Path, int | None] | None:
    """Folder and step of `training.branch_from`; None is for the newest checkpoint there."""
    branch = config.training.branch_from
    return _run_and_step(branch) if branch else None


def _check_branch(parent: Path, step: int | None, config: RunConfig, custom_optimizer: bool) -> None:
    """Refuses to branch from a run that `config` could not resume at that step."""
    kept = checkpoint_steps(parent / CHECKPOINTS)
    if not (parent / CONFIG).is_file() or not kept:
        raise RunFolderError(f"training.branch_from {parent} is not a run folder with checkpoints")
    if step is not None and step not in kept:
        listed = ", ".join(map(str, kept))
        raise RunFolderError(f"training.branch_from: {parent} keeps no checkpoint of step {step}; it keeps {listed}")
    _check_same(parent / CONFIG, config, custom_optimizer, done=step or kept[-1], ignored=_keys(_BEGINNING))


@contextlib.contextmanager
def open_run_folder(config: RunConfig, *, custom_optimizer: bool = False) -> Iterator[Path]:
    """The folder for this process alone, made where it is new, once the run in it is known to be this one.

    A run that has made no step, such as one that was too large for its device, leaves its folder to the next config.
    With `custom_optimizer` the caller, and not the config, sets the learning rates. A branch must fit the run that it
    grows from as a resume does.

    Raises:
        RunFolderError: when it cannot be written, another process trains in it, it is a Hugging Face directory, or it
            holds a run of another config (naming the differing keys).
    """
    folder = Path(config.training.run_dir).expanduser()
    if (folder / HUGGING_FACE_CONFIG).exists():
        raise RunFolderError(
            f"training.run_dir {folder} is a Hugging Face directory; choose another, with "
            f"training.init_from={folder} to start from its parameters"
        )
    with contextlib.ExitStack() as stack:
        try:
            if processes.index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(PermissionError):  # a folder that may not be listed
                    sync(folder.parent)
                with tempfile.TemporaryFile(dir=folder):
                    pass
                stack.enter_context(alone(folder))
            if not processes.shares(folder):
                raise RunFolderError(f"training.run_dir {folder} must be on a file system that all processes share")
            processes.check_same("config", dump_config(config))
            if _holds_begun_run(folder):
                done = max(checkpoint_steps(folder / CHECKPOINTS), default=0)
                _check_same(folder / CONFIG, config, custom_optimizer, done=done)
            elif found := branch_point(config):
                _check_branch(*found, config, custom_optimizer)
        except OSError as error:
            dangling = folder.is_symlink() and not folder.exists()
            reason = "a link to a folder that does not exist" if dangling else error.strerror or error
            raise RunFolderError(
                f"cannot write to training.run_dir {folder}: {reason}; choose a writable folder "
                f"with free space, e.g. training.run_dir=runs/again"
            ) from error
        yield folder


def settle_residual(config: RunConfig) -> RunConfig:
    """The run with `precision.islands.residual` of a float16 T5, whose residual stream outgrows float16.

    A new run without the setting gets bfloat16 where the hardware has it: float32 moves a fifth more bytes. A begun run
    keeps what its config.yaml has, or float32 where that has none.
    """
    islands = config.precision.islands
    if not config.model.outgrows_float16 or config.precision.compute != "float16" or "residual" in islands:
        return config
    if found := continued(config):
        with contextlib.suppress(ConfigError):  # `open_run_folder` reports it
            theirs = load_config(found[0] / CONFIG).precision.islands
            islands = {**islands, **{key: dtype for key, dtype in theirs.items() if key == "residual"}}
    elif has_bfloat16():
        islands = {**islands, "residual": "bfloat16"}
        _log.info("precision.islands.residual: bfloat16, this device's default for a float16 T5; float32 is more exact")
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, islands=islands))


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes the resolved config, once nothing can refuse the run any more; the first process does."""
    if processes.index() == 0:
        write_whole(folder / CONFIG, dump_config(config).encode())


def check_apart(config: DataConfig, run_dir: Path) -> None:
    """Refuses a run folder among the user's documents, since its files would be documents, and sets in data.path.

    Raises:
        DataError: naming both folders.
    """
    paths = {f"data.validation.{name}": Path(path).expanduser() for name, path in config.validation.items()}
    trained = None if config.path is None else Path(config.path).expanduser().resolve()
    for key, root in {**paths, **({"data.path": trained} if trained else {})}.items():
        within = root.resolve()
        if run_dir.resolve().is_relative_to(within):
            raise DataError(
                f"the run's folder {run_dir} is in {key} {root}, so that {METRICS} and {SAMPLE} would be documents; "
                f"choose a training.run_dir outside, or move the documents into a separate folder"
            )
        if key in paths and trained and (within.is_relative_to(trained) or trained.is_relative_to(within)):
            raise DataError(
                f"{key} {root} and data.path {trained} have documents in common, which would be trained on; move the "
                f"set into a separate folder, or evaluate it with jaxllm evaluate --data"
            )


def settle_tokenizer(
    config: DataConfig, source: Source, *, vocab_size: int, folder: Path, parent: Path | None = None
) -> Tokenizer:
    """The tokenizer of the run in `folder`, which keeps it from now on; a branch takes that of its parent's folder.

    Raises:
        DataError: when the config describes a tokenizer that the folder cannot take or that cannot be made.
    """
    file = next(iter(tokenizers_in(folder) + (tokenizers_in(parent) if parent else [])), None)
    given = tokenizer_choice.given_tokenizer(config)
    wanted = tokenizer_choice.origin_of(given, config, source, vocab_size=vocab_size)
    kept = None if file is None else _kept(file, wanted)
    decision = tokenizer_choice.decide(kept, wanted, begun=parent is not None or has_begun(folder))
    if isinstance(decision, Refuse):
        raise DataError(f"{file or folder} {decision.reason}; choose another training.run_dir")
    if file is not None and decision is Choice.KEEP:
        for path in (file.with_name(TOKENIZER_ORIGIN), file):
            if path.parent != folder and path.exists():
                write_whole(folder / path.name, path.read_bytes())
        return given or load_tokenizer(file)
    made = given or tokenizer_choice.make_tokenizer(config, source, vocab_size=vocab_size)
    if decision is Choice.MAKE_AGAIN:
        _check_made_again(made, parent or folder)
    if file is not None:
        file.unlink()
    write_whole(folder / TOKENIZER_ORIGIN, json.dumps(wanted).encode())  # first: alone it means nothing
    made.save(folder / TOKENIZER)
    return made


def _check_made_again(made: Tokenizer, folder: Path) -> None:
    """Compares a tokenizer with the fingerprint in checkpoints of the run, whose own tokenizer is lost."""
    known = None
    for path in (folder / CHECKPOINTS).glob("[0-9]*/data/metadata"):
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):  # damaged; another may not be
            record = json.loads(path.read_bytes())
            known = record.get("position", record)["tokenizer"]
    if made.fingerprint != known:
        raise DataError(
            f"{folder} holds a run whose tokenizer is not there any more, and that of this config is another "
            f"({made.fingerprint}, not {known}); restore {TOKENIZER} from a backup or choose another training.run_dir"
        )
    _log.info("the tokenizer of %s was lost and is made again, with the fingerprint of its checkpoints", folder)


def _kept(file: Path, wanted: Origin | None) -> Kept:
    record = file.with_name(TOKENIZER_ORIGIN)
    by_run = record.exists()
    if wanted is None:
        return Kept(None, by_run)
    if "fingerprint" in wanted:
        return Kept({"fingerprint": load_tokenizer(file).fingerprint}, by_run)
    try:
        return Kept(dict(json.loads(record.read_text(encoding="utf-8"))) if by_run else None, by_run)
    except (ValueError, TypeError):
        raise DataError(f"{record} is damaged; remove it if {file} is the run's own") from None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the lock ends with the process."""
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is training the run in {folder}; wait for it, stop it, or choose another "
                f"training.run_dir"
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): start no second process on it", folder, error.strerror)
        yield


def _keys(table: Mapping[str, str]) -> list[str]:
    return [f"{section}.{name}" for section, names in table.items() for name in names.split()]


def _check_same(path: Path, config: RunConfig, custom: bool, *, done: int, ignored: Sequence[str] = ()) -> None:
    try:
        old = load_config(path)
    except ConfigError as error:
        raise RunFolderError(f"the config of the run there cannot be read: {error}") from None
    fits = 0 < done <= config.training.steps
    same = fits and (custom or same_rates(old, config, steps=done))
    free = [*_keys(_MAY_CHANGE), *ignored, *(_keys(_RATES) if same else []), "data.validation"]
    differing = config_differences(old, config, ignored=free)
    first, now = (next(iter(each.data.validation.items()), "held-out documents") for each in (old, config))
    if first != now:
        differing.append(f"data.validation: {first} -> {now} (the first set must stay, others may change)")
    if differing:
        listed = "\n  ".join(differing)
        if done and not same:
            reason = f"rates of the {done} steps that are done would differ; training.init_from takes the parameters"
            listed += f"\n({reason if fits else f'{done} steps are done'})"
        resume = "resume it with its own config, or choose another training.run_dir"
        fix = "set them as they are there" if ignored else resume
        raise RunFolderError(
            f"{path.parent} holds a run of another config; these keys differ (there -> here):\n  {listed}\n{fix}"
        )
