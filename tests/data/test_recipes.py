"""Every objective through the pipeline: rows hold each token once, resume is exact, bad input is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.config.file import ConfigError, parse_config
from jaxllm.data import DataError
from jaxllm.data.packing import unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.records import texts
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from jaxllm.run.feed import build_pipeline

SHAPES = {
    "span_corruption": {"sequence_length": 64},
    "span_corruption_short": {"objective": "span_corruption", "sequence_length": 64, "example_length": 23},
    "ul2": {"sequence_length": 96, "target_length": 64},
    "prefix_lm": {"sequence_length": 48, "target_length": 40},
}


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows are read ahead: these tests open many pipelines."""
    monkeypatch.setattr("jaxllm.data.pipeline._WINDOW_ROWS", 64)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = [{"inputs": f"double {i}", "targets": f"{2 * i} is the double of {i}" * (i % 3 + 1)} for i in range(200)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with documents of 0 to 300 tokens, and one for the tokenizers and prepared data."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").mkdir()
    records = [
        "",
        " ",
        "a",
        "<extra_id_0> and </s> <pad>",
        *(f"the cat sat on mat {i}, " * (i % 40) for i in range(90)),
    ]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*records, *(w * 2 for w in "bcdefghijk")])
    (folder / "corpus" / "short.jsonl").write_text(lines)
    return folder


def open_pipeline(runs: Path, name: str, *, workers: int = 0, seed: int = 3, **changes: object) -> Pipeline:
    options = {"source": "files", "path": str(runs / "corpus"), "validation_fraction": 0.3, "objective": name}
    config = DataConfig(
        **{**options, "cache_dir": str(runs / "cache"), **SHAPES.get(name, {}), **changes}, workers=workers
    )
    own = runs if config.tokenizer == "train" else Path(config.tokenizer).with_suffix(".run")
    return build_pipeline(config, vocab_size=420, batch_size=4, seed=seed, run_dir=own, decoder_start_id=0)


def open_pairs(runs: Path, pairs: Path, **changes: object) -> Pipeline:
    options = {"path": str(pairs), "text_key": "inputs", "target_key": "targets", "sequence_length": 48}
    (runs / "pairs").mkdir(exist_ok=True)
    config = DataConfig(source="files", objective="seq2seq", **{"target_length": 64, **options, **changes})
    return build_pipeline(config, vocab_size=420, batch_size=4, seed=3, run_dir=runs / "pairs")


@pytest.mark.parametrize("name", SHAPES)
def test_validation_holds_every_token_once(runs: Path, name: str) -> None:
    """The texts of the split, joined in the order they are read, come back from the examples."""
    pipeline = open_pipeline(runs, name)
    restore = pipeline.recipe.restore
    batches = list(pipeline.validation(10_000))
    assert all(batch["targets"].shape == (4, pipeline.recipe.lengths[1]) for batch in batches)
    assert all(batch["encoder_tokens"].shape == (4, pipeline.recipe.lengths[0]) for batch in batches)
    found = [restore(*example) for batch in batches for example in unpack_pairs(batch)]
    documents = [pipeline.tokenizer.encode(text) for text in texts(pipeline._source.validation, "text")]
    assert {len(document) for document in documents} & set(range(1, 11))
    total = np.sort(np.concatenate(found)), np.sort(np.concatenate(documents))
    np.testing.assert_array_equal(*total)
    for example in found[:50]:
        assert not np.isin(example, [0, 1, *pipeline.tokenizer.sentinel_ids]).any()


@pytest.mark.parametrize(("name", "workers"), [("span_corruption", 0), ("ul2", 2), ("seq2seq", 0)])
def test_resume_is_exact(runs: Path, pairs: Path, name: str, workers: int) -> None:
    def fresh() -> Pipeline:
        return (
            open_pairs(runs, pairs, workers=workers)
            if name == "seq2seq"
            else open_pipeline(runs, name, workers=workers)
        )

    pipeline = fresh()
    for _ in range(3):
        next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    want = [next(pipeline) for _ in range(4)]
    pipeline.close()
    resumed = fresh()
    resumed.set_state(state)
    for batch in want:
        again = next(resumed)
        for key in batch:
            np.testing.assert_array_equal(again[key], batch[key])
    resumed.close()


def test_rows_are_a_function_of_the_seed(runs: Path) -> None:
    first, same, other = (next(open_pipeline(runs, "span_corruption", seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first["targets"], same["targets"])
    assert not np.array_equal(first["targets"], other["targets"])


@pytest.mark.parametrize("name", ["span_corruption", "prefix_lm"])
def test_id_0_is_a_word_like_any_other(runs: Path, tmp_path: Path, name: str) -> None:
    """T5's own code strips it; a tokenizer without a padding token uses it for text."""
    plain = open_pipeline(runs, name, tokenizer=few_sentinels(tmp_path, 100))
    documents = [plain.tokenizer.encode(text) for text in texts(plain._source.validation, "text")]
    content = json.loads((tmp_path / "few.json").read_text())
    vocab, pad = content["model"]["vocab"], "<pad>"
    frequent = np.bincount(np.concatenate(documents)).argmax()
    word = next(word for word, number in vocab.items() if number == frequent)
    vocab[word], vocab[pad] = vocab[pad], vocab[word]
    for token in content["added_tokens"]:
        token["id"] = vocab[pad] if token["content"] == pad else token["id"]
    (tmp_path / "zero.json").write_text(json.dumps(content).replace("<pad>", "<none>"))
    pipeline = open_pipeline(runs, name, tokenizer=str(tmp_path / "zero.json"))
    documents = [pipeline.tokenizer.encode(text) for text in texts(pipeline._source.validation, "text")]
    restored = [
        pipeline.recipe.restore(*example) for batch in pipeline.validation(10_000) for example in unpack_pairs(batch)
    ]
    want = np.bincount(np.concatenate(documents))
    assert want[0] > 100
    np.testing.assert_array_equal(np.bincount(np.concatenate(restored)), want)


def test_a_second_epoch_masks_other_spans(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(8):
        (tmp_path / "corpus" / f"{i}.txt").write_text(" ".join(str(i * 7919 + j * j) for j in range(100)))
    pipeline = open_pipeline(tmp_path, "span_corruption")
    seen = [tuple(row.tolist()) for batch in (next(pipeline) for _ in range(60)) for row in batch["targets"]]
    assert len(set(seen)) == len(seen)


def test_span_corruption_fills_its_rows(runs: Path) -> None:
    pipeline = open_pipeline(runs, "span_corruption", sequence_length=64)
    assert pipeline.recipe.lengths == (64, 14)
    for batch in (next(pipeline) for _ in range(20)):
        assert (batch["encoder_lengths"] == 64).all() and batch["weights"].all()
        assert (batch["decoder_tokens"][:, 0] == 0).all()
        np.testing.assert_array_equal(batch["decoder_tokens"][:, 1:], batch["targets"][:, :-1])


def test_pairs_are_the_files_pairs(runs: Path, pairs: Path) -> None:
    pipeline = open_pairs(runs, pairs)
    read = pipeline.tokenizer.decode
    found = {
        (read(inputs[:-1]), read(targets[:-1]))
        for batch in pipeline.validation(1000)
        for inputs, targets in unpack_pairs(batch)
    }
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    everything = {(record["inputs"], record["targets"]) for record in records}
    assert found <= everything and len(found) == len(pipeline._source.validation)
    packed = next(pipeline)["encoder_segment_ids"].max()
    assert packed > 1


def test_long_pairs_stop_or_are_cut_with_an_end(runs: Path, pairs: Path) -> None:
    with pytest.raises(DataError, match=r"the 'targets' of a pair has \d+ tokens and an end, data.target_length is 16"):
        list(open_pairs(runs, pairs, target_length=16).validation(1000))
    cut = open_pairs(runs, pairs, target_length=16, too_long="truncate")
    lengths = [len(targets) for batch in cut.validation(1000) for _, targets in unpack_pairs(batch)]
    ends = [targets[-1] for batch in cut.validation(1000) for _, targets in unpack_pairs(batch)]
    assert max(lengths) == 16 and set(ends) == {1}


BAD = {
    r"masks up to 70 spans in an example, the tokenizer has 3 sentinels": {
        "noise_density": 0.5,
        "sequence_length": 282,
    },
    r"no example of .* fits into 2 inputs": {"sequence_length": 2},
    r"makes 64 inputs and 14 targets, data.target_length is 12; set it to 14 or null, or .* to 56": {
        "target_length": 12
    },
}


@pytest.mark.parametrize("message", BAD)
def test_an_example_that_cannot_be_corrupted_is_named(runs: Path, tmp_path: Path, message: str) -> None:
    tokenizer = few_sentinels(tmp_path) if "sentinels" in message else "train"
    with pytest.raises(DataError, match=message):
        open_pipeline(runs, "span_corruption", **{"sequence_length": 64, **BAD[message], "tokenizer": tokenizer})


def few_sentinels(folder: Path, count: int = 3, *, special: bool = True) -> str:
    """A tokenizer.json with three sentinels, or with ones that text can spell."""
    whole = train_tokenizer(iter(["the cat sat on mat <extra_id_0> " * 9]), vocab_size=420)
    whole.save(folder / "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    kept = [f"<extra_id_{i}>" for i in range(count)]
    content["added_tokens"] = [
        {**token, "special": special} if token["content"] in kept else token
        for token in content["added_tokens"]
        if token["content"] in kept or "extra_id" not in token["content"]
    ]
    (folder / "few.json").write_text(json.dumps(content))
    return str(folder / "few.json")


def test_a_tokenizer_that_reads_sentinels_from_text_is_refused(runs: Path, tmp_path: Path) -> None:
    path = few_sentinels(tmp_path, 100, special=False)
    assert np.isin(load_tokenizer(path).encode("<extra_id_0>"), load_tokenizer(path).sentinel_ids).any()
    pipeline = open_pipeline(runs, "span_corruption", tokenizer=path, validation_fraction=0.5)
    with pytest.raises(DataError, match=r"reads '<extra_id_0>' in a document as a sentinel"):
        for _ in range(50):
            next(pipeline)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("noise_density", 0.0, r"noise_density must be above 0 and below 1, got 0.0"),
        ("noise_density", 1.0, r"noise_density must be above 0 and below 1, got 1.0"),
        ("mean_span_length", 0.5, r"mean_span_length must be at least 1, got 0.5"),
        ("example_length", 1, r"example_length must be at least 2 or null, got 1"),
        ("objective", "causal", r"data.objective 'causal' does not fit model.family 't5'"),
        ("objective", "ul2", r"objective ul2 on an encoder-decoder needs data.target_length"),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: object, message: str) -> None:
    model = {"family": "t5", "vocab_size": 400, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "head_dim": 8}
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": model, "data": {"objective": "span_corruption", key: value}})


def test_half_empty_pairs_are_reported(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"inputs": "a", "targets": "b"}\n{"inputs": "a", "targets": " "}\n')
    with pytest.raises(DataError, match=r"p.jsonl:2: 'targets' of the pair is empty; repair it or"):
        open_pairs(tmp_path, path)


def test_sentinels_of_a_loaded_tokenizer_count_down(tmp_path: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(few_sentinels(tmp_path, 100))
    assert tokenizer.sentinel_ids.tolist() == list(range(tokenizer.vocab_size - 1, tokenizer.vocab_size - 101, -1))
