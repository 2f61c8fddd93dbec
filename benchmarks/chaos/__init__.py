"""Faults on purpose, by a seed: what a run survives, as docs/reliability.md promises.

    python -m benchmarks.chaos                             # a small profile of every campaign, 1 to 2 minutes
    python -m benchmarks.chaos --seed 7 --large            # the figures of docs/reliability.md; hours
    python -m benchmarks.chaos --only kills --kills 200

Each campaign counts faults tried and survived, silent (wrong numbers, or good rows lost, without a word), tracebacks,
and steps lost beyond the last committed save. A chain of interrupted starts must end as an uninterrupted run does, to
the bit: every array of the last checkpoint, the position in the data, and the rows of metrics.jsonl but for timings.
The exit status is 1 when anything failed.
"""
