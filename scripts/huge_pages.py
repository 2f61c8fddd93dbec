"""Large arrays in huge pages, for scripts that compute on a CPU: `pretrain.py` and `generate.py` start with this.

Most Linux systems give huge pages only on request (`madvise`), and glibc requests them only when a variable of its
environment was set before the process began. XLA allocates the memory of every step again; mapping it by 4 KiB pages
costs a train step up to a fifth of its time. The package has no such code: a library must not restart its process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLES = "glibc.malloc.hugetlb=1"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Runs this same command again in this same process, once; call it before anything that takes time to import.

    Nothing happens where GLIBC_TUNABLES is set already, where huge pages cannot be requested (another system, or a
    kernel that gives them always or never), or with an NVIDIA GPU, whose memory holds the arrays. A glibc before 2.35
    and other C libraries ignore the variable.
    """
    if "GLIBC_TUNABLES" in os.environ or not _on_request() or any(Path("/dev").glob("nvidia[0-9]*")):
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
    return _MODE.is_file() and "[madvise]" in _MODE.read_text(encoding="ascii")
