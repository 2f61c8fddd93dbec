"""A result as one printed line, so that what was measured survives whatever happens to the process next."""

import contextlib
import json
import statistics
from typing import Any

RESULT = "RESULT "


def report(part: str, case: str, **values: Any) -> None:
    """Prints one result."""
    # One write for the whole line: other threads of the process write to the same file.
    print(RESULT + json.dumps({"part": part, "case": case, **values}) + "\n", end="", flush=True)


def results_in(text: str) -> list[dict[str, Any]]:
    """All results in the output of a process; one that was cut off is left out, and what follows it on its line."""
    found = []
    for rest in text.split(RESULT)[1:]:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.JSONDecoder().raw_decode(rest)[0])
    return [each for each in found if isinstance(each, dict) and {"part", "case"} <= each.keys()]


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
