"""Values inside a model, read and replaced where they arise, in any function of it."""

from jaxllm.study.derivatives import forward_mode
from jaxllm.study.hooks import Edit, capture, edit, sites

__all__ = ["Edit", "capture", "edit", "forward_mode", "sites"]
