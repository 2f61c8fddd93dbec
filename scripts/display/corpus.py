"""What an objective does to a corpus: examples in colour, and an audit of its tokens.

The audit restores the text of each example and compares it with the documents. Span lengths are compared with their
exact distribution, not with a fit.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from jaxllm.config import RunConfig
from jaxllm.data.objectives import after_sentinels, before_end, cut_at_sentinels
from jaxllm.data.packing import segments_of, unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.run.feed import open_run_pipeline
from jaxllm.storage.folder import alone, has_begun

_COLOURS = ("bold red", "bold green", "bold yellow", "bold blue", "bold magenta", "bold cyan")


@contextlib.contextmanager
def open_corpus(config: RunConfig) -> Iterator[Pipeline]:
    """The pipeline of a run. Before its first step only one process opens it, because the tokenizer may be replaced.

    Raises:
        RunFolderError: when another process starts the run.
        DataError: as `build_pipeline`.
    """
    folder = Path(config.training.run_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if has_begun(folder) else alone(folder):
        with contextlib.closing(open_run_pipeline(config, folder)) as pipeline:
            yield pipeline


class View(NamedTuple):
    """Text, inputs and targets of one example: a masked span has the colour of its sentinel in all three."""

    source: Text
    inputs: Text
    targets: Text


class Audit(NamedTuple):
    """What an objective did to documents."""

    documents: int  # documents read
    tokens: int  # tokens in them
    dropped: int  # tokens of the documents that are in no example
    added: int  # tokens in examples that are not in the documents
    rows: int  # rows made
    examples: int  # examples in them
    density: float  # fraction of the tokens that is masked; 0 where no sentinel is used
    spans: dict[int, int]  # observed count by span length
    expected: dict[int, float]  # expected count by span length under the exact distribution of these examples
    # fraction of padding in the encoder's and the decoder's slots; for a decoder alone, the same twice
    padding: tuple[float, float]


def view(inputs: np.ndarray, targets: np.ndarray, *, source: np.ndarray, tokenizer: Tokenizer) -> View:
    """Colours for one example and the text it was made of (`Recipe.restore`)."""
    sentinels, written = tokenizer.sentinel_ids, before_end(targets, tokenizer.eos_id)
    masked = after_sentinels(written, sentinels)
    whole, left, right = Text(), Text(), Text()
    kept = np.count_nonzero(~np.isin(before_end(inputs, tokenizer.eos_id), sentinels))
    mode = kept + sum(map(len, masked.values())) - len(source)  # tokens before the text
    for part in cut_at_sentinels(inputs, sentinels):
        if part[0] in sentinels:
            mark, part = int(part[0]), part[1:]
            left.append(tokenizer.decode([mark]), _colour(mark, tokenizer))
            whole.append(tokenizer.decode(masked.get(mark, part[:0])), _colour(mark, tokenizer))
        left.append(tokenizer.decode(part))
        whole.append(tokenizer.decode(before_end(part[mode:], tokenizer.eos_id)))
        mode = 0
    for part in cut_at_sentinels(targets, sentinels):
        colour = _colour(int(part[0]), tokenizer) if part[0] in sentinels else "bold green"
        right.append(tokenizer.decode(part), colour)
    if not masked:
        begin = len(source) - len(written)
        whole = Text(tokenizer.decode(source[:begin])).append(tokenizer.decode(source[begin:]), "bold green")
    return View(whole, left, right)


def audit(pipeline: Pipeline, *, documents: int) -> Audit:
    """Runs the objective once over the first training documents and counts every token."""
    tokenizer = pipeline.tokenizer
    size = tokenizer.vocab_size
    before, after = np.zeros(size, np.int64), np.zeros(size, np.int64)
    count = rows = 0
    for tokens in pipeline.tokens(documents):
        before += np.bincount(tokens, minlength=size)
        count += 1
    spans, groups = Counter[int](), Counter[tuple[int, int]]()
    used, slots = np.zeros(2), np.zeros(2)
    for batch in pipeline.once(documents):
        rows += len(batch["targets"])
        for side, ids in enumerate(segments_of(batch)):
            used[side] += np.count_nonzero(ids)
            slots[side] += ids.size
        for inputs, targets in unpack_pairs(batch):
            after += np.bincount(pipeline.recipe.restore(inputs, targets), minlength=size)
            found = after_sentinels(before_end(targets, tokenizer.eos_id), tokenizer.sentinel_ids)
            lengths = [len(span) for span in found.values() if len(span)]
            spans.update(lengths)
            groups[sum(lengths), len(lengths)] += 1
    padding = 1 - used / np.maximum(slots, 1)
    return Audit(
        documents=count,
        tokens=int(before.sum()),
        dropped=int(np.maximum(before - after, 0).sum()),
        added=int(np.maximum(after - before, 0).sum()),
        rows=rows,
        examples=groups.total(),
        density=sum(length * found for length, found in spans.items()) / max(int(before.sum()), 1),
        spans=dict(sorted(spans.items())),
        expected=_expected(groups),
        padding=(float(padding[0]), float(padding[1])),
    )


def _expected(groups: Counter[tuple[int, int]]) -> dict[int, float]:
    expected = Counter[int]()
    for (tokens, spans), examples in groups.items():
        if spans:
            counts = _span_length_law(tokens, spans) * spans * examples
            expected.update({k: float(count) for k, count in enumerate(counts, start=1) if count})
    return dict(sorted(expected.items()))


def total_variation(found: Audit) -> float:
    """Half the sum of |observed - expected| fractions of span lengths, from 0 (equal) to 1 (disjoint)."""
    lengths = {*found.spans, *found.expected}
    total = max(sum(found.spans.values()), 1)
    return sum(abs(found.spans.get(k, 0) - found.expected.get(k, 0.0)) for k in lengths) / total / 2


def report(found: Audit, *, longest: int = 12) -> Table:
    """The audit as a table; span lengths beyond `longest` in one line."""
    table = Table("", "found", "exact distribution")
    table.add_row("documents, tokens", f"{found.documents}, {found.tokens}")
    table.add_row("examples, rows", f"{found.examples}, {found.rows}")
    table.add_row("tokens dropped, added", f"{found.dropped}, {found.added}", "0, 0")
    table.add_row("padding: encoder, decoder", ", ".join(f"{share:.2%}" for share in found.padding))
    if not found.spans:
        return table
    table.add_row("masked tokens", f"{found.density:.2%}")
    total, mean = sum(found.spans.values()), sum(k * n for k, n in found.spans.items())
    table.add_row("spans, mean length", f"{total}, {mean / total:.3f}")
    for k in itertools.chain(range(1, longest + 1), [None]):
        label = f"longer than {longest}" if k is None else f"spans of {k}"
        shares = []
        for counts in (found.spans, found.expected):
            chosen = (n for length, n in counts.items() if (length > longest if k is None else length == k))
            shares.append(f"{sum(chosen) / total:.2%}")
        table.add_row(label, *shares)
    table.add_row("total variation distance", f"{total_variation(found):.4f}", "0")
    return table


def draw_spans(found: Audit, path: str | None, *, longest: int = 12) -> None:
    """Writes a picture of the span lengths and their exact distribution, where a path is given.

    Raises:
        ValueError: for an objective that masks no spans.
    """
    if path is None:
        return
    if not found.spans:
        raise ValueError(
            "a picture of span lengths needs an objective with spans, such as data.objective=span_corruption"
        )
    from matplotlib.figure import Figure

    total, lengths = sum(found.spans.values()), range(1, min(max({*found.spans, *found.expected}), longest) + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="length of a span (tokens)", ylabel="fraction of the spans", xticks=lengths)
    axes.bar(lengths, [found.spans.get(k, 0) / total for k in lengths], color="#56b4e9", label=f"{total:,} spans found")
    exact = [found.expected.get(k, 0) / total for k in lengths]
    axes.plot(lengths, exact, "o", color="#d55e00", label="exact distribution")
    axes.set_title(f"Total variation distance {total_variation(found):.4f}", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _colour(sentinel: int, tokenizer: Tokenizer) -> str:
    place = int(np.flatnonzero(tokenizer.sentinel_ids == sentinel)[0])
    return _COLOURS[place % len(_COLOURS)]


def _span_length_law(items: int, parts: int) -> np.ndarray:
    """P(a given part has length 1, 2, ...) in `compositions`: C(items-k-1, parts-2) / C(items-1, parts-1)."""
    if parts == 1:
        return np.arange(1, items + 1) == items
    longest = items - parts + 1
    whole = math.comb(items - 1, parts - 1)
    return np.array([math.comb(items - k - 1, parts - 2) / whole for k in range(1, longest + 1)])
