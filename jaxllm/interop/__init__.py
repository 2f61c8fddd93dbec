"""Weights of other libraries: Hugging Face directories and Meta's checkpoints to ours, and back."""


class InteropError(ValueError):
    """A checkpoint of another library that cannot be read or written; the message names what is wrong in it."""
