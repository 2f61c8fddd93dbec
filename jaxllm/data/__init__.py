"""From documents to token arrays: NumPy on the host, knowing no model.

`DataError` is every complaint about data; importing the modules here loads TFDS, grain and tokenizers, importing
jaxllm does not.
"""


class DataError(ValueError):
    """Data that cannot be used; the message names it and the fix."""


class BatchError(DataError):
    """The next batch of a run that cannot be made; what was made before stays good, so that its step can be saved."""


def first_line(error: BaseException) -> str:
    """What a person needs of an error; a library's can continue for thousands of characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
