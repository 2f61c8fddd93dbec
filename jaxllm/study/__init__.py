"""Looking into a model: values at hook points, edits of them, and the dtypes of a step."""

from jaxllm.jaxprs.hooks import Edit, capture, edit, sites
from jaxllm.jaxprs.interpret import forward_mode

__all__ = ["Edit", "capture", "edit", "forward_mode", "sites"]
