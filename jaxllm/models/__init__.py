"""The families as thin Flax modules, and how to build one from its config."""

from jaxllm.models.family import FAMILIES, Family, build, decoder_of, family_of
from jaxllm.models.llama.model import Llama
from jaxllm.models.model import Model, abstract_params, check_model, check_params, count_params, init_params
from jaxllm.models.t5.model import T5

__all__ = ["FAMILIES", "T5", "Family", "Llama", "Model", "build", "decoder_of", "family_of"]
__all__ += ["abstract_params", "check_model", "check_params", "count_params", "init_params"]
