"""Changes to a case that nobody has measured on a GPU yet, by name: `train/llama_1b@cublas`, `decode/8b_b1@graphs`.

Several are joined by a plus sign: `train/t5_large@cublas+merger0`. A variant becomes the default, or goes, once a GPU
has shown which is better.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """What a variant changes."""

    flags: tuple[str, ...] = ()  # of XLA, each as `name=value`
    settings: tuple[str, ...] = ()  # of the run, each as `section.key=value`; for train cases
    case: Mapping[str, Any] = {}  # fields of `train.Case` or `decode.Case` that are replaced


VARIANTS = {
    # Matmuls by cuBLAS only; every MaxText recipe for GPUs sets this.
    "cublas": Variant(flags=("xla_gpu_enable_triton_gemm=false",)),
    # Matmuls that share an operand stay apart, so that q, k and v are not sliced out of one result.
    "merger0": Variant(flags=("xla_gpu_dot_merger_threshold_mb=0",)),
    # The loop over tokens as one CUDA graph.
    "graphs": Variant(
        flags=(
            "xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
            "xla_gpu_graph_min_graph_size=1",
        )
    ),
    # Without CUDA graphs, to measure what they save. A traced step runs without them, too.
    "nographs": Variant(flags=("xla_gpu_enable_command_buffer=",)),
    # T5's rows without lengths: cuDNN then computes a bias gradient, but needs no padding mask.
    "nolengths": Variant(case={"lengths": False}),
    # Logits of the training loss wait in bfloat16 for their exponentials, which stay float32.
    "bf16_logits": Variant(settings=("precision.islands.logits=bfloat16",)),
    # T5 in float16 keeps its residual stream in float32, as on a GPU without bfloat16.
    "f32_residual": Variant(settings=("precision.islands.residual=float32",)),
}


def split(name: str) -> tuple[str, list[Variant]]:
    """The case of a name, and the variants behind its @.

    Raises:
        ValueError: for a variant that does not exist.
    """
    case, _, joined = name.partition("@")
    names = joined.split("+") if joined else []
    if unknown := [each for each in names if each not in VARIANTS]:
        raise ValueError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    return case, [VARIANTS[each] for each in names]
