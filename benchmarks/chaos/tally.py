"""What a campaign counted."""

from __future__ import annotations

import dataclasses
from typing import Any

HEAD = ("campaign", "run", "tried", "survived", "silent", "tracebacks", "steps lost", "")


@dataclasses.dataclass
class Tally:
    """Faults of one kind, in one kind of run.

    Attributes:
        campaign: kind of fault.
        lane: kind of run.
        tried: faults.
        survived: those after which all was as promised.
        silent: those after which numbers were wrong, or rows lost, without a word.
        tracebacks: those that ended in a traceback, a crash or a hang.
        lost: largest number of steps lost beyond the last committed save.
        notes: counts of what happened.
        failures: a description of each that failed.
    """

    campaign: str
    lane: str
    tried: int = 0
    survived: int = 0
    silent: int = 0
    tracebacks: int = 0
    lost: int = 0
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def count(self, what: str, outcome: str, *, faults: int = 1) -> None:
        """Adds faults with one outcome: "silent", "traceback", "failed: ..." or else a kind of survival."""
        self.tried += faults
        self.notes[outcome.partition(":")[0]] = self.notes.get(outcome.partition(":")[0], 0) + faults
        self.silent += faults * (outcome == "silent")
        self.tracebacks += faults * outcome.startswith("traceback")
        if outcome == "silent" or outcome.startswith(("traceback", "failed")):
            self.failures.append(f"{self.campaign} {self.lane}: {what}: {outcome}")
        else:
            self.survived += faults

    def row(self) -> tuple[Any, ...]:
        """Of the table under `HEAD`."""
        notes = ", ".join(f"{count} {name}" for name, count in sorted(self.notes.items()))
        return self.campaign, self.lane, self.tried, self.survived, self.silent, self.tracebacks, self.lost, notes


def table(tallies: list[Tally]) -> str:
    """In Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(tally.row() for tally in tallies)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
