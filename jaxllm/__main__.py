"""`python -m jaxllm` is the program `jaxllm`."""

import importlib
import sys

if __name__ == "__main__":  # unlike in a worker process
    sys.path[:0] = [__file__.replace("__main__.py", f"../{folder}") for folder in ("jaxllm_scripts", "scripts")]
    sys.exit(importlib.import_module("cli").main())
