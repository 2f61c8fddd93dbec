"""Damaged inputs: the YAML of a run, files of documents, and Hugging Face directories.

Each is refused in a sentence or read as it is.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from benchmarks.chaos.damage import deleted, flipped, truncated, zeroed
from benchmarks.chaos.lanes import ROOT, Lane, results_of
from benchmarks.chaos.tally import Tally

Generator = np.random.Generator

_VALUES = (None, -1, 0, 1, 3, 1e9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "1e3", [], [1], {}, {"a": 1}, True)


def changed(tree: Any, rng: Generator) -> Any:
    """A tree of dicts and lists with one value replaced, one key removed, renamed, or one added."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = list(tree)[int(rng.integers(len(tree)))]
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.7:
            return {**tree, key: changed(tree[key], rng)}
        kind = int(rng.integers(6))
        rest = {name: value for name, value in tree.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, f"{key}s": tree[key]}
        if kind == 2:
            return {**tree, "other": _value(rng)}
        return {**tree, key: _value(rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        place = int(rng.integers(len(tree)))
        return [*tree[:place], changed(tree[place], rng), *tree[place + 1 :]]
    return _value(rng)


def _value(rng: Generator) -> Any:
    return _VALUES[int(rng.integers(len(_VALUES)))]


def configs(root: Path, count: int, seed: int) -> Tally:
    """Changes the configs in configs/ as values and as text: ConfigError, or a run whose YAML reads back equal."""
    tally, files = Tally("config", "all"), sorted((ROOT / "configs").glob("*.yaml"))
    place = root / "configs"

    def trial(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 8, number])
        source = files[number % len(files)]
        file = place / f"{number}.yaml"
        overrides: list[str] = []
        kind = int(rng.integers(4))
        shutil.copy(source, file)
        what = f"{number}: {source.name}"
        if kind == 0:
            what += f", {(flipped, truncated, zeroed)[int(rng.integers(3))](file, rng)}"
        elif kind == 1:
            tree = yaml.safe_load(source.read_text())
            section = str(rng.choice(list(tree)))
            key = str(rng.choice([*(tree[section] or {"x": 0}), "other"])) if isinstance(tree[section], dict) else "x"
            overrides = [f"{section}.{key}={_value(rng)}"]
        else:
            tree = yaml.safe_load(source.read_text())
            for _ in range(kind - 1):
                tree = changed(tree, rng)
            file.write_text(yaml.safe_dump(tree, sort_keys=False))
        outcome = _config_outcome(file, overrides)
        file.unlink()
        return {"what": f"{what} {overrides}", "outcome": outcome}

    for result in results_of(place, count, trial):
        tally.count(result["what"], result["outcome"])
    return tally


def _config_outcome(file: Path, overrides: list[str]) -> str:
    from jaxllm.config.file import ConfigError, dump_config, load_config, parse_config

    try:
        config = load_config(file, overrides)
        again = parse_config(yaml.safe_load(dump_config(config)))
    except ConfigError:
        return "refused in a sentence"
    except Exception as error:
        return f"traceback: {error!r}"[:300]
    return "accepted, reads back equal" if again == config else "silent"


def documents(root: Path, count: int, seed: int) -> Tally:
    """Changes bytes of files of documents: DataError, or documents that can all be read.

    Altered text is not counted as silent: plain text and some compressed files hold no checksum.
    """
    tally, place = Tally("file of documents", "all"), root / "documents"
    texts = [f"document {i}: the cat sat on mat {i % 7} and saw {i * i} birds, äöü. " * 8 for i in range(60)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    whole = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "a.jsonl.zst": zstandard.compress(lines)}
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), parquet)
    whole["a.parquet"] = parquet.getvalue()

    def trial(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 10, number])
        name = list(whole)[number % len(whole)]
        file = place / f"{number}" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(whole[name])
        what = f"{number}: {name}, {(flipped, flipped, truncated, zeroed)[int(rng.integers(4))](file, rng)}"
        outcome = _corpus_outcome(file, skips=bool(rng.integers(2)))
        shutil.rmtree(file.parent)
        return {"what": what, "outcome": outcome}

    for result in results_of(place, count, trial):
        tally.count(result["what"], result["outcome"])
    return tally


def _corpus_outcome(file: Path, *, skips: bool) -> str:
    from jaxllm.config import DataConfig
    from jaxllm.data import DataError
    from jaxllm.data.records import texts
    from jaxllm.data.sources import open_source

    config = DataConfig(
        source="files", path=str(file), validation_fraction=0.2, on_bad_text="skip" if skips else "stop"
    )
    try:
        source = open_source(config, cache_dir=file.parent / "prepared")
        total = [*texts(source.documents("this campaign"), "text"), *texts(source.validation, "text")]
    except DataError:
        return "refused in a sentence"
    except Exception as error:
        return f"traceback: {error!r}"[:300]
    fewer = "fewer documents, as skip allows" if skips else "fewer documents"
    return f"accepted, {'all documents' if len(total) == 60 else fewer}"


def directories(lane: Lane, root: Path, count: int, seed: int) -> Tally:
    """Changes a Hugging Face directory's files as values and as bytes: an error that scripts report, or a model."""
    tally, place = Tally("Hugging Face directory", lane.name), root / "directories" / lane.name

    def export(number: int) -> dict[str, Any]:
        from display.convert import export_run

        del number
        export_run(lane.folder, place / "whole")
        return {}

    list(results_of(place, 1, export))
    files = sorted(path.name for path in (place / "whole").iterdir())

    def trial(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, 9, number])
        folder = place / f"{number}"
        shutil.copytree(place / "whole", folder)
        file = folder / files[int(rng.integers(len(files)))]
        what = f"{number}: {file.name}"
        if file.suffix == ".json" and rng.random() < 0.7:
            tree = json.loads(file.read_text())
            for _ in range(int(rng.integers(1, 3))):
                tree = changed(tree, rng)
            file.write_text(json.dumps(tree))
        else:
            what += f", {(flipped, truncated, deleted, zeroed)[int(rng.integers(4))](file, rng)}"
        outcome = _model_outcome(folder)
        shutil.rmtree(folder)
        return {"what": what, "outcome": outcome}

    for result in results_of(place, count, trial):
        tally.count(result["what"], result["outcome"])
    return tally


def _model_outcome(folder: Path) -> str:
    """What comes of reading a directory as scripts/generate.py does, which reports these errors in a sentence."""
    import jax
    import jax.numpy as jnp

    from jaxllm.interop.hf import load_hf
    from jaxllm.run.load import load_text_model

    try:
        tokens = jax.ShapeDtypeStruct((1, len(load_text_model(folder).encode("line 3: the cat"))), jnp.int32)
        model, params = load_hf(folder)
        inputs = (tokens, tokens) if model.config.encoder_decoder else (tokens,)
        jax.eval_shape(lambda params: model.apply({"params": params}, *inputs), params)
    except (ValueError, RuntimeError, OSError) as error:
        return "refused in a sentence" if str(error).strip() else f"traceback: {error!r}"
    except Exception as error:
        return f"traceback: {error!r}"[:300]
    return "accepted"
