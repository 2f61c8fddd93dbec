"""Looking into a model: values at hook points, edits of them, and the dtypes of a step."""

from jaxllm.jaxprs.derivatives import forward_mode
from jaxllm.jaxprs.hooks import Edit, capture, edit, sites

__all__ = ["Edit", "capture", "edit", "forward_mode", "sites"]
