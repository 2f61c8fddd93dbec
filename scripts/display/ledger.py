"""The precision ledger as a table for a terminal."""

from collections import Counter
from collections.abc import Collection

from jaxllm.study.ledger import Entry, violations


def table(entries: Counter[Entry], excused: Collection[tuple[str, str]] = ()) -> str:
    """One line per entry; those below float32 are marked LOW, or moved if `excused`."""
    rows = [("", "count", *Entry._fields)]
    bad = set(violations(entries, excused))
    marks = {entry: "LOW" if entry in bad else "moved" if entry.low else "" for entry in entries}
    rows += [(marks[entry], str(entries[entry]), *entry) for entry in sorted(entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
