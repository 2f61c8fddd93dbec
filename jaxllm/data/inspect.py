"""What an objective does to a corpus, for a person to see: examples in colour, and an audit of all of it.

The audit compares with the text itself: examples go back through their inverse, and what does not come back was
dropped. The law that span lengths are compared with is exact, not a fit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from jaxllm.data.objectives import before_end, span_length_law
from jaxllm.data.packing import segments_of, unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.tokenizer import Tokenizer

_COLOURS = ("bold red", "bold green", "bold yellow", "bold blue", "bold magenta", "bold cyan")


class View(NamedTuple):
    """One example in colours: a masked span has the colour of its sentinel in all three.

    Attributes:
        source: the text.
        inputs: what the encoder reads.
        targets: what the decoder should write.
    """

    source: Text
    inputs: Text
    targets: Text


class Audit(NamedTuple):
    """What an objective did to documents.

    Attributes:
        documents: documents read.
        tokens: tokens in them.
        dropped: of these, how many are in no example.
        added: tokens in examples that are not in the documents.
        rows: rows made.
        examples: examples in them.
        density: part of the tokens that is hidden; 0 where no sentinel is used.
        spans: observed count by span length.
        expected: count by span length under the exact law of these examples.
        padding: part of the encoder's and of the decoder's slots that is padding; of a decoder alone, the same twice.
    """

    documents: int
    tokens: int
    dropped: int
    added: int
    rows: int
    examples: int
    density: float
    spans: dict[int, int]
    expected: dict[int, float]
    padding: tuple[float, float]


def view(inputs: np.ndarray, targets: np.ndarray, *, source: np.ndarray, tokenizer: Tokenizer) -> View:
    """Colours for one example and the text it was made of (`Recipe.restore`)."""
    written = before_end(targets, tokenizer.eos_id)
    hidden = {int(part[0]): part[1:] for part in _spans(written, tokenizer)}
    whole, left, right = Text(), Text(), Text()
    kept = np.count_nonzero(~_is_sentinel(before_end(inputs, tokenizer.eos_id), tokenizer))
    mode = kept + sum(map(len, hidden.values())) - len(source)  # tokens that are read before the text
    for part in _parts(inputs, tokenizer):
        if _is_sentinel(part[:1], tokenizer).any():
            mark, part = int(part[0]), part[1:]
            left.append(tokenizer.decode([mark]), _colour(mark, tokenizer))
            whole.append(tokenizer.decode(hidden.get(mark, part[:0])), _colour(mark, tokenizer))
        left.append(tokenizer.decode(part))
        whole.append(tokenizer.decode(before_end(part[mode:], tokenizer.eos_id)))
        mode = 0
    for part in _parts(targets, tokenizer):
        marked = _is_sentinel(part[:1], tokenizer).any()
        right.append(tokenizer.decode(part), _colour(int(part[0]), tokenizer) if marked else "bold green")
    if not hidden:
        begin = len(source) - len(written)
        whole = Text(tokenizer.decode(source[:begin])).append(tokenizer.decode(source[begin:]), "bold green")
    return View(whole, left, right)


def audit(pipeline: Pipeline, *, documents: int) -> Audit:
    """Runs the objective once over the first training documents and accounts for every token."""
    tokenizer = pipeline.tokenizer
    size = tokenizer.vocab_size
    before, after = np.zeros(size, np.int64), np.zeros(size, np.int64)
    count = 0
    for tokens in pipeline.tokens(documents):
        before += np.bincount(tokens, minlength=size)
        count += 1
    spans, groups = Counter[int](), Counter[tuple[int, int]]()
    rows = examples = hidden = 0
    used, slots = np.zeros(2), np.zeros(2)
    for batch in pipeline.once(documents):
        rows += len(batch["targets"])
        for side, ids in enumerate(segments_of(batch)):
            used[side] += np.count_nonzero(ids)
            slots[side] += ids.size
        for inputs, targets in unpack_pairs(batch):
            after += np.bincount(pipeline.recipe.restore(inputs, targets), minlength=size)
            examples += 1
            lengths = [len(part) - 1 for part in _spans(before_end(targets, tokenizer.eos_id), tokenizer)]
            lengths = [length for length in lengths if length]
            spans.update(lengths)
            groups[sum(lengths), len(lengths)] += 1
            hidden += sum(lengths)
    padding = 1 - used / np.maximum(slots, 1)
    return Audit(
        documents=count,
        tokens=int(before.sum()),
        dropped=int(np.maximum(before - after, 0).sum()),
        added=int(np.maximum(after - before, 0).sum()),
        rows=rows,
        examples=examples,
        density=hidden / max(int(before.sum()), 1),
        spans=dict(sorted(spans.items())),
        expected=_expected(groups),
        padding=(float(padding[0]), float(padding[1])),
    )


def _expected(groups: Counter[tuple[int, int]]) -> dict[int, float]:
    expected = Counter[int]()
    for (tokens, spans), examples in groups.items():
        if spans:
            law = span_length_law(tokens, spans) * spans * examples
            expected.update({k: float(value) for k, value in enumerate(law, start=1) if value})
    return dict(sorted(expected.items()))


def total_variation(found: Audit) -> float:
    """Half the sum of |observed - expected| shares of span lengths: 0 is the law itself, 1 shares nothing with it."""
    lengths = {*found.spans, *found.expected}
    total = max(sum(found.spans.values()), 1)
    return sum(abs(found.spans.get(k, 0) - found.expected.get(k, 0.0)) for k in lengths) / total / 2


def report(found: Audit, *, longest: int = 12) -> Table:
    """The audit as a table; span lengths beyond `longest` in one line."""
    table = Table("", "found", "exact law")
    table.add_row("documents, tokens", f"{found.documents}, {found.tokens}")
    table.add_row("examples, rows", f"{found.examples}, {found.rows}")
    table.add_row("tokens dropped, added", f"{found.dropped}, {found.added}", "0, 0")
    table.add_row("padding: encoder, decoder", ", ".join(f"{share:.2%}" for share in found.padding))
    if not found.spans:
        return table
    table.add_row("hidden tokens", f"{found.density:.2%}")
    total, mean = sum(found.spans.values()), sum(k * n for k, n in found.spans.items())
    table.add_row("spans, mean length", f"{total}, {mean / total:.3f}")
    for k in itertools.chain(range(1, longest + 1), [None]):
        label = f"longer than {longest}" if k is None else f"spans of {k}"
        shares = [
            sum(n for length, n in counts.items() if (length > longest if k is None else length == k)) / total
            for counts in (found.spans, found.expected)
        ]
        table.add_row(label, f"{shares[0]:.2%}", f"{shares[1]:.2%}")
    table.add_row("total variation distance", f"{total_variation(found):.4f}", "0")
    return table


def _is_sentinel(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return np.isin(tokens, tokenizer.sentinel_ids)


def _parts(tokens: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Cut before each sentinel; without empty parts."""
    return [part for part in np.split(tokens, np.flatnonzero(_is_sentinel(tokens, tokenizer))) if len(part)]


def _spans(targets: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    return [part for part in _parts(targets, tokenizer) if _is_sentinel(part[:1], tokenizer).any()]


def _colour(sentinel: int, tokenizer: Tokenizer) -> str:
    place = int(np.flatnonzero(tokenizer.sentinel_ids == sentinel)[0])
    return _COLOURS[place % len(_COLOURS)]
