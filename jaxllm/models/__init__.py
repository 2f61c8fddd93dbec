"""The families as thin Flax modules, and how to build one from its config."""

from jaxllm.models.family import (
    FAMILIES,
    Family,
    Model,
    abstract_params,
    build,
    check_model,
    check_params,
    count_params,
    family_of,
    init_params,
)

__all__ = [
    "FAMILIES",
    "Family",
    "Model",
    "abstract_params",
    "build",
    "check_model",
    "check_params",
    "count_params",
    "family_of",
    "init_params",
]
