"""A run that is only looked at, shared by the tests of what comes after training."""

from __future__ import annotations

import pytest

from jaxllm.config import RunConfig
from jaxllm.run.trainer import pretrain
from tests.conftest import write_corpus
from tests.run.test_pretrain import config


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two steps of a small Llama."""
    folder = tmp_path_factory.mktemp("short")
    write_corpus(folder / "corpus")
    settings = {"steps": 2, "save_every": 2, "eval_every": 2, "eval_batches": 1, "sample_tokens": 0}
    run = config(folder / "run", folder / "corpus", training=settings)
    pretrain(run)
    return run
