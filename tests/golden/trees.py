"""The golden parameter trees as paths of names, for tests of code that repeats those names by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path


def leaf_paths() -> set[tuple[str, ...]]:
    """Paths such as (layers, q_proj, kernel) of every parameter of every case of both families."""
    files = sorted(Path(__file__).parent.glob("*_tree.json"))
    cases = [case for file in files for case in json.loads(file.read_text()).values()]
    return {tuple(re.findall(r"\['(\w+)'\]", name)) for case in cases for name in case}
