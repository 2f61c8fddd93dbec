"""Evaluates models on tasks of lm-evaluation-harness, for `jaxllm evaluate PATH --tasks NAMES`.

`JaxLM` is the harness' interface to a model of jaxllm. Needs the extra `eval`. In Python, every option is there:
`lm_eval.simple_evaluate(load_lm(PATH), tasks=[...])`. Contexts are encoded and cut as in the harness' class for Hugging
Face models, `HFLM`.
"""

import functools
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    fix = "pip install 'jaxllm[eval]', or in a clone pip install -e '.[eval]'"
    raise ImportError(f"tasks need lm-evaluation-harness: {fix} ({error})") from error

from jaxllm.generation.scoring import score_greedy
from jaxllm.generation.text import TextModel
from jaxllm.models import decoder_of
from jaxllm.ops.sampling import Sampling
from jaxllm.run.load import read_text_model

_log = logging.getLogger(__name__)
_SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")  # all but the first need a temperature
_GENERATION = ("until", "max_gen_toks", "do_sample", *_SAMPLING)


@register_model("jaxllm")
class JaxLM(TemplateLM):
    """A text model for the harness; its log-likelihoods are those of `jaxllm.score`, its text that of `generate`."""

    def __init__(self, text: TextModel, *, batch_size: int = 8, add_bos_token: bool = True) -> None:
        """`text` has parameters as in training, see `load_lm`.

        `add_bos_token` puts `text.begin` before each context, as a run's training does; `HFLM` follows its tokenizer.
        """
        super().__init__()
        self.text, self.batch_size = text if add_bos_token else text._replace(begin=()), batch_size
        self.max_length = text.model.config.context or 2048
        self.prefix, self._seeds = (*text.begin, *text.eos_ids)[0], itertools.count()
        self.backend = "seq2seq" if text.model.config.encoder_decoder else "causal"

    eot_token_id = property(lambda self: self.text.eos_ids[0])
    prefix_token_id = property(lambda self: self.prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a context, or of a continuation where `add_special_tokens` is False."""
        return self.text.tokenizer.encode(string).tolist() if add_special_tokens is False else self.text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihoods of whole texts, each token predicted once. Raises ValueError for an encoder-decoder."""
        self.check_rolling()
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = [[*get_rolling_token_windows(ids, self.prefix, self.max_length, context_len=1)] for ids in texts]
        pairs = [(None, *make_disjoint_window(pair)) for pair in itertools.chain(*windows)]
        found = iter(self._loglikelihood_tokens(pairs))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        order, found = Collator(requests, sort_fn=lambda request: -len(request[1]) - len(request[2])), []
        for batch in map(list, order.get_batched(n=self.batch_size)):
            pairs = self._filled([(self._cut(ids, len(new) - 1), new) for _, ids, new in batch])
            rows = score_greedy(self.text.model, self.text.params, *zip(*pairs, strict=True), pad_id=self.text.pad_id)
            found += [(sum(row), greedy) for row, greedy in rows[: len(batch)]]
        return order.get_original(found)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Text up to the first `until` string; ValueError for an argument that `jaxllm.generate` does not have."""
        given, found = [request.args for request in requests], []
        order = Collator(given, lambda each: -len(each[0]), lambda each: each[1], group_by="gen_kwargs")
        for batch in map(list, order.get_batched(n=self.batch_size)):
            options = normalize_gen_kwargs(batch[0][1], 256)
            if unknown := options.keys() - {*_GENERATION}:
                known = ", ".join(_GENERATION)
                raise ValueError(f"generation_kwargs {', '.join(sorted(unknown))} are not supported; use {known}")
            until, count = [text for text in options["until"] if text], options["max_gen_toks"]
            prompts = self._filled([self._cut(self.tok_encode(context), count) for context, _ in batch])
            names = _SAMPLING if options.get("temperature") else _SAMPLING[:1]
            sampling = Sampling(**{name: options[name] for name in names if name in options})
            seeds = list(itertools.islice(self._seeds, len(prompts)))
            rows = self._generating.generate(prompts, max_new_tokens=count, sampling=sampling, stop=until, seed=seeds)
            found += [self._text(row, until) for row in rows[: len(batch)]]
        return order.get_original(found)

    def check_rolling(self, *names: str) -> None:
        """Raises ValueError for an encoder-decoder, with `names` of the loglikelihood_rolling tasks to leave out."""
        if self.backend == "seq2seq":
            family, listed = self.text.model.config.family, f" ({', '.join(names)})" if names else ""
            raise ValueError(
                f"a {family} model cannot run tasks of type loglikelihood_rolling, since it predicts targets and not "
                f"whole texts; leave these tasks out{listed}"
            )

    @functools.cached_property
    def _generating(self) -> TextModel:
        return self.text._replace(params=decoder_of(self.text.model).prepare(self.text.params))

    def _text(self, ids: list[int], until: list[str]) -> str:
        sizes = self.text.tokenizer.token_bytes  # 0 for special tokens, which HFLM leaves out
        text = self.text.tokenizer.decode([i for i in ids if i < len(sizes) and sizes[i]])
        return functools.reduce(lambda rest, end: rest.split(end)[0], until, text)

    def _filled(self, rows: list[Any]) -> list[Any]:
        return rows + rows[:1] * (self.batch_size - len(rows))  # few shapes to compile

    def _cut(self, context: list[int], new: int) -> list[int]:
        """The last tokens of a context that leave room for `new` tokens, as in HFLM."""
        room = self.max_length if self.backend == "seq2seq" else self.max_length - new
        if room < 1:
            raise ValueError(f"{new} new tokens leave no room for a context in {self.max_length}; lower max_gen_toks")
        if len(context) > room:
            _log.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return (context or [self.prefix])[-room:]


def load_lm(path: str, *, dtype: str = "float32", **options: Any) -> JaxLM:
    """The model of a run, a step of it or a Hugging Face directory; options are those of `JaxLM`."""
    return JaxLM(read_text_model(path, dtype), **options)


def evaluate_tasks(
    path: str,
    names: Sequence[str],
    *,
    task_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> str:
    """Evaluates tasks, groups or patterns such as `mmlu_*`, and returns the harness' table.

    `task_path` is a folder with YAML files of further tasks; `num_fewshot` and `limit` are those of `simple_evaluate`.

    Raises:
        ValueError: for a task that is unknown or that the model cannot run, a number out of range, or a missing folder.
        ConfigError, CheckpointError, InteropError: when the model cannot be read.
    """
    least = {"--num-fewshot": (num_fewshot, 0), "--limit": (limit, 1), "--batch-size": (batch_size, 1)}
    for option, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise ValueError(f"{option} must be at least {lowest}, got {value}")
    if task_path and not Path(task_path).is_dir():
        raise ValueError(f"--task-path {task_path} is not a folder; give the folder of the YAML files")
    _free_the_name_evaluate()
    manager = lm_eval.tasks.TaskManager(include_path=task_path)
    found = {name: manager.match_tasks([name]) for name in map(str.strip, names) if name}
    if not found:
        raise ValueError("--tasks needs names of tasks, such as lambada_openai,piqa")
    if unknown := [name for name, matches in found.items() if not matches]:
        raise ValueError(
            f"no task {', '.join(unknown)}; `lm_eval ls tasks` lists those of lm-evaluation-harness, and --task-path "
            f"FOLDER adds yours"
        )
    tasks = list(dict.fromkeys(itertools.chain(*found.values())))
    model = load_lm(path, batch_size=batch_size or 8)
    if model.backend == "seq2seq":
        kinds = {name: task.OUTPUT_TYPE for name, task in manager.load(tasks)["tasks"].items()}
        if rolling := [name for name, kind in kinds.items() if kind == "loglikelihood_rolling"]:
            model.check_rolling(*rolling)
    options = {"num_fewshot": num_fewshot, "limit": limit}
    return make_table(lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, **options)).rstrip()


def _free_the_name_evaluate() -> None:
    """Removes scripts/ from sys.path: scripts/evaluate.py hides the Hugging Face package `evaluate` of some tasks."""
    scripts = Path(__file__).parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != scripts.resolve()]
    if not hasattr(sys.modules.get("evaluate"), "load"):
        sys.modules.pop("evaluate", None)
