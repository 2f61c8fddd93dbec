"""Tasks of lm-evaluation-harness: what `jaxllm evaluate PATH --tasks NAMES` does, and its class for our models.

Needs the extra `eval`. In Python, `lm_eval.simple_evaluate(load_lm(PATH), tasks=[...])` has every option. Contexts are
encoded and cut as in the harness' class for Hugging Face models, `HFLM`.
"""

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

try:
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise ImportError(f"tasks need lm-evaluation-harness: pip install 'jaxllm[eval]' ({error})") from error

from jaxllm.generation.scoring import score_greedy
from jaxllm.generation.text import TextModel
from jaxllm.models import decoder_of
from jaxllm.ops.sampling import Sampling
from jaxllm.run.load import read_text_model

_log = logging.getLogger(__name__)
_SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")  # all but the first need a temperature


@register_model("jaxllm")
class JaxLM(TemplateLM):
    """A text model for the harness; its log-likelihoods are those of `jaxllm.score`, its text that of `generate`."""

    def __init__(self, text: TextModel, *, batch_size: int = 8, add_bos_token: bool = True) -> None:
        """`text` has parameters as in training, see `load_lm`.

        `add_bos_token` puts `text.begin` before each context, as training does; `HFLM` does what its tokenizer does.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        self.text, self.batch_size = text if add_bos_token else text._replace(begin=()), batch_size
        self.max_length = text.model.config.context or 2048
        self.prefix, self._seeds = (*text.begin, *text.eos_ids)[0], itertools.count()
        self.backend = "seq2seq" if text.model.config.encoder_decoder else "causal"

    eot_token_id = property(lambda self: self.text.eos_ids[0])
    prefix_token_id = property(lambda self: self.prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a context, or with False of a continuation."""
        return self.text.tokenizer.encode(string).tolist() if add_special_tokens is False else self.text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihoods of whole texts, each token predicted once, from the begin token on; no encoder-decoder."""
        if self.backend == "seq2seq":
            raise ValueError(f"{self.text.model.config.family} has no loglikelihood_rolling: it answers a context")
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
            if unknown := options.keys() - {"until", "max_gen_toks", "do_sample", *_SAMPLING}:
                raise ValueError(f"jaxllm does not generate with {', '.join(unknown)}, but with {', '.join(_SAMPLING)}")
            until, count = [text for text in options["until"] if text], options["max_gen_toks"]
            prompts = self._filled([self._cut(self.tok_encode(context), count) for context, _ in batch])
            names = _SAMPLING if options.get("temperature") else _SAMPLING[:1]
            sampling = Sampling(**{name: options[name] for name in names if name in options})
            seeds = list(itertools.islice(self._seeds, len(prompts)))
            rows = self._generating.generate(prompts, max_new_tokens=count, sampling=sampling, stop=until, seed=seeds)
            found += [self._text(row, until) for row in rows[: len(batch)]]
        return order.get_original(found)

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
        """The end of a context that leaves room for new tokens, as in HFLM; empty, which is refused, without room."""
        room = max(self.max_length if self.backend == "seq2seq" else self.max_length - new, 0)
        if len(context) > room:
            _log.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return (context or [self.prefix])[-room:] if room else []


def load_lm(path: str, *, dtype: str = "float32", **options: Any) -> JaxLM:
    """The model of a run, a step of it or a Hugging Face directory; options are those of `JaxLM`."""
    return JaxLM(read_text_model(path, dtype), **options)


def evaluate_tasks(
    path: str, names: Sequence[str], *, task_path: str | None = None, batch_size: int = 8, **options: Any
) -> str:
    """The harness' table of tasks; `task_path` has YAML files of further ones, `options` are of `simple_evaluate`.

    Raises:
        ValueError: for a name that is no task or group of tasks, or a batch size below 1.
        ConfigError, CheckpointError, InteropError: when the model cannot be read.
    """
    manager = lm_eval.tasks.TaskManager(include_path=task_path)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(f"no task {', '.join(unknown)}; `lm_eval ls tasks` lists those of lm-evaluation-harness")
    model = load_lm(path, batch_size=batch_size)
    return make_table(lm_eval.simple_evaluate(model, tasks=list(names), task_manager=manager, **options)).rstrip()
