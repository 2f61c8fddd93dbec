"""The length of a run may change as long as the learning rates of its steps so far stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.config.file import load_config, with_overrides
from jaxllm.run.trainer import pretrain
from jaxllm.storage.folder import RunFolderError
from tests.conftest import write_corpus
from tests.run.test_pretrain import config, final_params, losses

ROOT = Path(__file__).parent.parent.parent


def stable(folder: Path, *, steps: int, **training: int) -> RunConfig:
    """A run whose last two steps decay."""
    rule = {"schedule": "wsd", "warmup_steps": 1, "decay_steps": 2}
    return config(folder, folder.parent / "corpus", optimizer=rule, training={"steps": steps, **training})


def test_a_lengthened_run_equals_the_long_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "corpus")
    long = stable(tmp_path / "long", steps=8)
    pretrain(long)
    pretrain(stable(tmp_path / "grown", steps=6), stop_at=4)  # its decay would begin at step 4
    grown = stable(tmp_path / "grown", steps=8)
    assert pretrain(grown).resumed_from == 4
    for a, b in zip(final_params(long), final_params(grown), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(long) == losses(grown)
    with pytest.raises(RunFolderError, match=r"(?s)training.steps: 8 -> 12.*rates of the 8 steps that are done would"):
        pretrain(stable(tmp_path / "grown", steps=12))
    assert load_config(tmp_path / "grown" / "config.yaml").training.steps == 8


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_config_takes_a_few_steps(name: str) -> None:
    run = with_overrides(load_config(ROOT / "configs" / name), ["training.steps=3"])
    assert run.training.steps == 3
