"""Imports what scripts/pretrain.py uses and opens no device: forks of a process that has done so start quickly."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
for name in ("scripts.pretrain", "display.in_place", "matplotlib.figure", "jaxllm.run.trainer"):
    importlib.import_module(name)

# Collections took 10% of a run. What has been imported stays, so forks need not search it.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)  # most objects of jax stay, too
