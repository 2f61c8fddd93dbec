"""The small profile of benchmarks.chaos: a few faults of every kind, and every chain ends to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos import lanes
from benchmarks.chaos.damage import flipped
from benchmarks.chaos.tally import Tally

ROOT = Path(__file__).parent.parent.parent


def test_a_few_faults_of_every_kind_are_survived(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.chaos", "--folder", str(tmp_path / "runs"), "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    assert not found["failures"]
    campaigns = {row[0] for row in found["rows"]}
    assert len(campaigns) == 13 and all(row[2] == row[3] > 0 for row in found["rows"])  # tried and survived


def test_a_difference_in_what_a_run_ends_with_would_be_found(tmp_path: Path) -> None:
    """Fingerprints, the position in the data, rows of metrics, and a step that is missing."""
    checkpoint = tmp_path / "run" / "checkpoints" / "4" / "data"
    checkpoint.mkdir(parents=True)
    record = {"fingerprints": {"params/a": "1"}, "position": {"next": 3}, "checksum": "2"}
    rows = [{"step": 4, "loss": 1.0, "data_wait": 0.1}, {"step": 4, "fingerprint": "5"}]

    def write(record: dict, rows: list[dict]) -> str:
        (checkpoint / "metadata").write_text(json.dumps(record))
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return lanes.differences(lane, tmp_path / "run")

    lane = lanes.Lane("x", None, tmp_path, {}, 0.0)
    write(record, rows)
    lane = lane._replace(end=lanes.end_of(tmp_path / "run"))
    assert write(record, [{**rows[0], "data_wait": 9.0}, {"step": 3, "fingerprint": "of a stop"}, rows[1]]) == ""
    assert write({**record, "fingerprints": {"params/a": "2"}}, rows) == "fingerprints"
    assert write({**record, "position": {"next": 4}}, rows) == "position"
    assert write(record, [{**rows[0], "loss": 2.0}, rows[1]]) == write(record, rows[:1]) == "rows"
    (checkpoint / "metadata").unlink()
    assert "cannot be read" in lanes.differences(lane, tmp_path / "run")


@pytest.mark.parametrize("outcome", ["silent", "traceback: KeyError", "failed: not bitwise"])
def test_a_fault_that_is_not_survived_is_a_failure(outcome: str) -> None:
    tally = Tally("kind", "run")
    tally.count("one", "fell back")
    assert not tally.failures and tally.survived == 1
    tally.count("other", outcome)
    assert tally.failures == [f"kind run: other: {outcome}"] and (tally.tried, tally.survived) == (2, 1)


def test_damage_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    file, found = tmp_path / "file", []
    for seed in (3, 3, 4):
        file.write_bytes(bytes(1000))
        what = flipped(file, np.random.default_rng(seed))
        assert sum(byte.bit_count() for byte in file.read_bytes()) == 1
        found.append(what)
    assert found[0] == found[1] != found[2]
