"""Fine-tuning on pairs from a TFDS name: the same batches and parameters as from a .jsonl of the same pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxllm.config import RunConfig
from jaxllm.data.builders import LocalInfo, content_hash
from jaxllm.data.packing import unpack_pairs
from jaxllm.run.feed import open_run_pipeline
from jaxllm.run.trainer import pretrain
from tests.run.test_pretrain_t5 import config, final_params

RECORDS = [{"question": f"double {i}", "answer": f"{2 * i} is the double of {i}" * (i % 3 + 1)} for i in range(120)]
HELD_OUT = [content_hash(*record.values()) < 0.2 * 2**64 for record in RECORDS]

# Not registered, so that its name leads to nothing but the folder: a set that was prepared elsewhere.
with tfds.core.registered.skip_registration():

    class DoublePairs(tfds.core.GeneratorBasedBuilder):
        """The pairs, split as files are, or all in one split."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in ("split", "whole"))

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in RECORDS[0]})
            return LocalInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
            if self.builder_config.name == "whole":
                return {"train": self._generate_examples((False, True))}
            return {"train": self._generate_examples((False,)), "validation": self._generate_examples((True,))}

        def _generate_examples(self, sides: tuple[bool, ...]) -> Iterator[tuple[int, dict[str, str]]]:
            for index, (record, held_out) in enumerate(zip(RECORDS, HELD_OUT, strict=True)):
                if held_out in sides:
                    yield index, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared sets, and the same pairs as a file."""
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("split", "whole"):
        DoublePairs(data_dir=str(folder / "sets"), config=name).download_and_prepare(file_format="array_record")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def pairs_run(folder: Path, name: str, **data: object) -> RunConfig:
    keys = {"objective": "seq2seq", "text_key": "question", "target_key": "answer", "target_length": 64}
    return config(
        folder, name, {**keys, "cache_dir": str(folder / "sets"), **data}, steps=2, save_every=2, eval_every=2
    )


def from_both(folder: Path, name: str) -> tuple[RunConfig, RunConfig]:
    by_name = pairs_run(folder, f"{name}_name", source="double_pairs/split")
    return by_name, pairs_run(folder, f"{name}_file", source="files", path=str(folder / "pairs.jsonl"))


def test_batches_are_those_of_the_file(folder: Path) -> None:
    named, filed = (open_run_pipeline(run, make(run)) for run in from_both(folder, "batches"))
    assert named.source_name == "double_pairs/split/1.0.0"
    for ours, want in zip((next(named) for _ in range(12)), (next(filed) for _ in range(12)), strict=True):
        assert ours.keys() == want.keys()
        for key in want:
            np.testing.assert_array_equal(ours[key], want[key])
    found, held_out = texts(named), [tuple(r.values()) for r, held in zip(RECORDS, HELD_OUT, strict=True) if held]
    assert found == texts(filed) == sorted(held_out) and 10 < len(found) < 60


def test_a_set_of_one_split_is_cut_in_two(folder: Path) -> None:
    run = pairs_run(folder, "whole", source="double_pairs/whole")
    pipeline = open_run_pipeline(run, make(run))
    assert (len(pipeline._source.train), len(pipeline._source.validation)) == (96, 24)
    assert texts(pipeline) == sorted(tuple(record.values()) for record in RECORDS[:24])


def test_a_run_is_that_of_the_file(folder: Path) -> None:
    runs = from_both(folder, "run")
    summaries = [pretrain(run) for run in runs]
    assert [summary.finished for summary in summaries] == [True, True]
    assert summaries[0].validation == summaries[1].validation
    for ours, want in zip(*map(final_params, runs), strict=True):
        np.testing.assert_array_equal(ours, want)


def test_a_field_that_the_set_lacks_is_named_with_those_it_has(folder: Path) -> None:
    run = pairs_run(folder, "lacking", source="double_pairs/split")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, target_key="targets"))
    with pytest.raises(ValueError, match=r"records have no field 'targets'; set data.*: answer, question"):
        open_run_pipeline(run, make(run))


def make(run: RunConfig) -> Path:
    folder = Path(run.training.run_dir)
    folder.mkdir()
    return folder


def texts(pipeline) -> list[tuple[str, str]]:
    """All pairs of the validation split, as they were before they became tokens."""
    read = pipeline.tokenizer.decode
    batches = pipeline.validation(1000)
    return sorted((read(i[:-1]), read(t[:-1])) for batch in batches for i, t in unpack_pairs(batch))
