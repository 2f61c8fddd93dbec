"""From documents to token arrays: NumPy on the host, knowing no model.

Every error about data is a `DataError`. The modules here load TFDS, grain and tokenizers; `import jaxllm` does not.
"""


class DataError(ValueError):
    """Data that cannot be used; the message names it and the fix."""


class BatchError(DataError):
    """The next batch cannot be made; earlier ones stay good, so that their step can be saved."""


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, which in libraries can have thousands of characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
