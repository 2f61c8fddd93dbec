"""What is measured on a GPU, in order of worth, with the seconds that each case should take and may take at most.

No GPU has measured the seconds: they are estimates for an H100 with 16 CPU cores, start and compilation included.
"""

from typing import NamedTuple


class Planned(NamedTuple):
    """One case."""

    name: str  # part/case, with variants behind an @
    seconds: int  # what it should take
    limit: int  # what it may take
    profile: bool = False  # whether the times of its kernels are recorded too


# The first call of a machine that nothing has run on yet, within FIRST_SECONDS: the real script, which library calls
# are right and how fast, and the four headline programs with their kernels.
FIRST_SECONDS = 395
FIRST = (
    Planned("pretrain/llama_fp16", 90, 130),
    Planned("probe/all", 70, 110),
    Planned("train/llama_1b", 75, 140, profile=True),
    Planned("train/t5_large", 95, 200, profile=True),
    Planned("decode/8b_b1", 50, 110, profile=True),
)
# What `next` runs after it, as far as it is unmeasured and fits.
LATER = (
    Planned("decode/1b_b1", 38, 90, profile=True),
    Planned("tests/gpu", 60, 150),
    Planned("pretrain/t5_fp16", 90, 130),
    Planned("train/llama_1b@cublas", 55, 120, profile=True),
    Planned("train/t5_large@cublas+merger0", 75, 160, profile=True),
    Planned("baseline/llama_8b_decode", 150, 300),
    Planned("baseline/llama_1b_train", 150, 300),
    Planned("train/t5_large_fp16", 75, 160),
    Planned("decode/1b_b1@graphs", 25, 80),
    Planned("decode/8b_b1@graphs", 35, 90),
    Planned("baseline/t5_large_train", 160, 320),
    Planned("train/llama_8b_8layers", 75, 150, profile=True),
    Planned("train/llama_1b_fp16", 55, 120),
    Planned("decode/t5_large_b1", 50, 110, profile=True),
    Planned("train/t5_large@nolengths", 75, 160),
    Planned("train/llama_1b@bf16_logits", 55, 120),
    Planned("train/t5_large_fp16@f32_residual", 75, 160),
    Planned("baseline/llama_1b_decode", 150, 300),
    Planned("decode/8b_b1_8k", 60, 120),
    Planned("train/t5_base", 75, 150),
    Planned("baseline/t5_large_decode", 150, 300),
    Planned("train/llama_1b@merger0", 55, 120),
    Planned("train/t5_large@merger0", 75, 160),
    Planned("train/llama_1b_packed", 60, 130),
    Planned("train/llama_8b_8layers_packed", 75, 150),
    Planned("train/llama_1b_accumulated", 70, 150),
    Planned("train/llama_1b_no_remat", 55, 120),
    Planned("decode/1b_b8", 38, 90),
    Planned("decode/1b_b64", 40, 90),
    Planned("decode/8b_b8", 50, 110),
    Planned("decode/8b_b64", 55, 110),
    Planned("decode/t5_large_b8", 50, 110),
    Planned("decode/t5_large_b64", 50, 110),
    Planned("decode/8b_int8_b1", 50, 110),
    Planned("decode/1b_b1_8k", 45, 100),
    Planned("pretrain/llama_bf16", 90, 130),
    Planned("pretrain/t5_bf16", 90, 130),
)
EVERY = (*FIRST, *LATER)


def cases_of(name: str) -> list[Planned]:
    """The planned case of this name, or `first`, or those whose names begin so; a variant takes its case's seconds."""
    exact = [case for case in EVERY if case.name == name]
    if exact or name == "first":
        return exact or list(FIRST)
    base, at, _ = name.partition("@")
    if at:
        return [case._replace(name=name) for case in EVERY if case.name == base]
    return [case for case in EVERY if case.name.startswith(name)]
