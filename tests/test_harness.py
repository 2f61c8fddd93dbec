"""Our class for lm-evaluation-harness next to the harness' own for Hugging Face models, on tasks from local files.

It needs the extra `eval`, which the tests of CI do not install: its 40 packages take 300 MB and a minute.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from display.convert import export_run
from jaxllm.run.load import load_text_model
from jaxllm.run.trainer import pretrain
from tests.conftest import write_corpus
from tests.run import test_pretrain, test_pretrain_t5

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'jaxllm[eval]')")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="accelerate, which lm_eval's class for Hugging Face needs, is not installed")
load_lm = importlib.import_module("display.tasks").load_lm
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # of the harness and its libraries

ROOT = Path(__file__).parent.parent
CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {**CHOICES, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "local_text": {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["bird", "\n\n"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Three tasks as the harness' YAML, on one file of documents."""
    lines = []
    for i in range(11):
        question = " ".join(f"line {j}: the cat {i} sat on mat" for j in range(1 + i % 5)) + "  " * (i % 2)
        choices = [f" {i} and saw {i * 3} birds", " mat", f" {i % 7}", " and saw a very long thing that nobody knows"]
        lines.append({"question": question, "choices": choices, "label": i % 4, "answer": " 3"})
    lines.append(
        {"question": "x" * 150, "choices": [" a", " bb"], "label": 0, "answer": "b"}
    )  # longer than the context
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        text = {} if name == "local_rolling" else {"doc_to_text": "{{question}}"}
        data = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
        described = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({**described, "doc_to_text": "", **task, **text}))
    return folder


def trained(folder: Path, name: str, run: Any) -> tuple[Path, Path]:
    pretrain(run)
    export_run(run.training.run_dir, folder / f"{name}-hf")
    return Path(run.training.run_dir), folder / f"{name}-hf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    write_corpus(folder / "corpus")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def llama(folder: Path) -> tuple[Path, Path]:
    training = {"steps": 40, "save_every": 40, "eval_every": 40, "sample_tokens": 0, "batch_size": 8}
    rule = {"learning_rate": 1e-2}
    model = {"max_length": 64}
    run = test_pretrain.config(folder / "run", folder / "corpus", training=training, optimizer=rule, model=model)
    return trained(folder, "llama", run)


@pytest.fixture(scope="module")
def t5(folder: Path) -> tuple[Path, Path]:
    data = {"path": str(folder / "corpus"), "objective": "span_corruption"}
    run = test_pretrain_t5.config(folder, "t5", data)
    # Tied, because the harness ties the embeddings of every T5: transformers 5.24 reads `false` in its config as true.
    return trained(folder, "t5", dataclasses.replace(run, model=dataclasses.replace(run.model, tie_embeddings=True)))


def theirs(directory: Path, *, begin: bool = False, **options: Any) -> Any:
    """The harness' class with the exported model and tokenizer; `begin` adds the begin token to a text."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    marks = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **marks)
    config = transformers.AutoConfig.from_pretrained(directory)
    if config.is_encoder_decoder:  # as T5's tokenizers do
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    elif begin:
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", **options)


def results(model: Any, folder: Path, tasks: list[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Metrics, and what the model answered to each document, by task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    options = {"tasks": tasks, "task_manager": manager, "log_samples": True, "bootstrap_iters": 0, "verbosity": "ERROR"}
    found = lm_eval.simple_evaluate(model=model, **options)
    answers = {task: [each["resps"] for each in found["samples"][task]] for task in tasks}
    metrics = {name: value for task in tasks for name, value in found["results"][task].items() if "," in name}
    return {name: value for name, value in metrics.items() if isinstance(value, float)}, answers


def numbers(answers: list[Any]) -> np.ndarray:
    return np.array([float(choice[0][0]) for each in answers for choice in each])


def assert_same(ours: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    assert ours[0].keys() == other[0].keys() and len(ours[0]) > 0
    for name, value in other[0].items():
        assert ours[0][name] == pytest.approx(value, rel=1e-4), name
    for task, answers in ours[1].items():
        if task == "local_text":
            assert answers == other[1][task]
        elif task == "local_rolling":
            flat = [np.array(each, dtype=float).ravel() for each in (answers, other[1][task])]
            np.testing.assert_allclose(*flat, atol=1e-3, rtol=1e-5)
        else:
            np.testing.assert_allclose(numbers(answers), numbers(other[1][task]), atol=1e-4)
            greedy = [[choice[0][1] for each in side for choice in each] for side in (answers, other[1][task])]
            assert greedy[0] == greedy[1]


@pytest.mark.parametrize("begin", [False, True])
def test_llama_has_the_numbers_of_the_harness(llama: tuple[Path, Path], folder: Path, begin: bool) -> None:
    run, directory = llama
    tasks = ["local_choice", "local_text", *([] if begin else ["local_rolling"])]
    expected = results(theirs(directory, begin=begin), folder, tasks)
    for path in (run, directory):
        assert_same(results(load_lm(path, batch_size=5, add_bos_token=begin), folder, tasks), expected)
    texts = [each[0][0] for each in expected[1]["local_text"]]
    assert len({*texts}) > 2 and not any("bird" in text for text in texts)


def test_t5_has_its_likelihoods_and_refuses_rolling(t5: tuple[Path, Path], folder: Path) -> None:
    """Its text is not compared: the harness adds the length of the context to max_gen_toks."""
    model, reference = load_lm(t5[0]), theirs(t5[1])
    assert_same(results(model, folder, ["local_choice"]), results(reference, folder, ["local_choice"]))
    (text,) = model.generate_until([request("line 3: the cat", {"max_gen_toks": 4})])
    (other,) = reference.generate_until([request("line 3: the cat", {"max_gen_toks": 4})], disable_tqdm=True)
    assert other.startswith(text)
    with pytest.raises(ValueError, match="a t5 model cannot run tasks of type loglikelihood_rolling"):
        results(model, folder, ["local_rolling"])
    ended = evaluate(t5[0], "--tasks", "local_choice,local_rolling", "--task-path", folder / "tasks")
    assert ended.returncode == 2 and "leave these tasks out (local_rolling)" in ended.stderr


def request(*arguments: Any) -> Any:
    return type("Request", (), {"args": arguments})()


def test_samples_settings_and_empty_contexts(llama: tuple[Path, Path]) -> None:
    from lm_eval.api import registry

    model, text = load_lm(llama[0]), load_text_model(llama[0])
    plain = model.generate_until([request("line 3: the", {"max_gen_toks": 9})])
    assert plain == [text("line 3: the", max_new_tokens=9)]
    drawn = [request("line", {"max_gen_toks": 9, "do_sample": True, "temperature": 1.5, "top_k": 50})] * 4
    assert len({*model.generate_until(drawn)}) > 1
    greedy = model.generate_until([request("line", {"max_gen_toks": 9, "do_sample": False, "top_p": 0.5})] * 2)
    assert greedy[0] == greedy[1]
    with pytest.raises(ValueError, match="generation_kwargs num_beams are not supported; use until"):
        model.generate_until([request("line", {"num_beams": 3})])
    ((empty, _),) = model.loglikelihood([request("", "line 3")], disable_tqdm=True)
    (rolling,) = model.loglikelihood_rolling([request("line 3")])
    assert empty == pytest.approx(rolling, abs=1e-5)
    assert type(model).__name__ == "JaxLM" and type(model) is registry.get_model("jaxllm")


def evaluate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_jaxllm_evaluate_prints_a_table(llama: tuple[Path, Path], folder: Path) -> None:
    ended = evaluate(llama[0], "--tasks", "local_choice,local_text", "--task-path", folder / "tasks", "--limit", "3")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 5 and "|local_choice|" in ended.stdout
    ended = evaluate(llama[0], "--tasks", "local_choice,local_text", "--task-path", folder / "tasks")
    assert ended.returncode == 0, ended.stderr
    expected = results(load_lm(llama[0]), folder, ["local_choice"])[0]["acc,none"]
    assert "|local_choice|" in ended.stdout and f"{expected:.4f}" in ended.stdout and "exact_match" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "local_chioce,piqa"], "error: no task local_chioce; `lm_eval ls tasks` lists"),
        (["--tasks", " , "], "error: --tasks needs names of tasks"),
        (["--tasks="], "error: --tasks needs names of tasks"),
        (["--tasks", "piqa", "data.seed=1", "--data", "a.txt"], "leave out data.seed=1 --data a.txt"),
        (["--tasks", "piqa", "--num_fewshot", "3"], "cannot be used with --tasks; leave out"),
        (["--tasks", "piqa", "--batch-size", "0"], "error: --batch-size must be at least 1, got 0"),
        (["--tasks", "piqa", "--limit", "0"], "error: --limit must be at least 1, got 0"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "error: --num-fewshot must be at least 0, got -1"),
        (["--tasks", "piqa", "--task-path", "nowhere"], "error: --task-path nowhere is not a folder"),
        (["--limit", "3"], "--limit needs --tasks"),
    ],
)
def test_bad_arguments_are_named(llama: tuple[Path, Path], arguments: list[str], message: str) -> None:
    ended = evaluate(llama[0], *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_tasks_that_import_the_package_evaluate_get_it_and_patterns_are_expanded(
    llama: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    """Hugging Face's package has the name of scripts/evaluate.py."""
    program = "import evaluate\nassert evaluate.load\n\n\ndef answer(document):\n    return document['answer']\n"
    (tmp_path / "own.py").write_text(program)
    task = (folder / "tasks" / "local_text.yaml").read_text().replace("local_text", "own_text")
    task = re.sub('"doc_to_target": "answer"', '"doc_to_target": !function own.answer', task)
    (tmp_path / "own_text.yaml").write_text(task)
    words = [llama[0], "--tasks", "own_*", "--task-path", tmp_path, "--limit", "2"]
    for command in ([ROOT / "scripts" / "evaluate.py"], ["-m", "jaxllm", "evaluate"]):
        ended = subprocess.run([sys.executable, *command, *words], capture_output=True, text=True, check=False)
        assert ended.returncode == 0 and "|own_text|" in ended.stdout, ended.stderr
