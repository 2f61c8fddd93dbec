"""Files that survive a power loss: their bytes are on disk before their name, and their name before the next step."""

import errno
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


class Appended:
    """A file that grows. What a full or failing disk refuses is kept, and written before what comes next."""

    def __init__(self, path: Path) -> None:
        """Opens the file or makes it."""
        self._file, self._waiting, self._failed = path.open("ab", buffering=0), b"", False

    def write(self, data: bytes) -> None:
        """Appends bytes; the first failure in a row is a warning."""
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                _log.warning("%s cannot be written (%s); what it lacks is tried again", self._file.name, error.strerror)
            self._failed = True

    def sync(self) -> None:
        """Puts the bytes on disk, for files that depend on them; a failure is a warning."""
        try:
            sync(Path(self._file.name))
        except OSError as error:
            _log.warning("%s cannot be synced (%s)", self._file.name, error.strerror)

    def close(self) -> None:
        """Writes the bytes of failed writes again, and closes the file."""
        if self._failed:  # without a failure, bytes that wait are in the file: Ctrl-C came before their removal
            self.write(b"")
        self._file.close()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    sync(partial)
    move(partial, path)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder, on disk when it returns."""
    source.replace(target)
    for folder in {source.parent, target.parent}:
        sync(folder)


def sync(path: Path) -> None:
    """Puts the bytes of a file or the names in a folder on disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Puts all below a folder on disk, and the folder with its own name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        sync(path)
