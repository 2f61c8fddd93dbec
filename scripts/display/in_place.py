"""Whether the config.yaml that a program is given belongs to the run of its folder."""

from collections.abc import Sequence
from pathlib import Path

from jaxllm.config import RunConfig
from jaxllm.storage.folder import CHECKPOINTS, CONFIG, RunFolderError


def check_in_place(config: RunConfig, path: str | Path, overrides: Sequence[str]) -> None:
    """Refuses the config.yaml of a moved or copied run folder, whose training.run_dir is another folder.

    Args:
        config: the file with the overrides.
        path: the file.
        overrides: as on the command line; one of training.run_dir settles it.

    Raises:
        RunFolderError: naming both folders.
    """
    here, there = Path(path).parent, Path(config.training.run_dir).expanduser()
    chosen = any(each.startswith("training.run_dir=") for each in overrides)
    if Path(path).name != CONFIG or not (here / CHECKPOINTS).is_dir() or chosen:
        return
    if here.resolve() != there.resolve():
        raise RunFolderError(
            f"{path} is the config of the run in its folder, but its training.run_dir is {there}; set "
            f"training.run_dir={here} to resume the run in its folder, or {there} for that one"
        )
