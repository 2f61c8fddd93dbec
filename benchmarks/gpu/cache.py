"""The compilation cache of a machine as a few files, to be carried to the next machine of its kind.

What autotuning chose comes first: it is small, makes later runs compute the same, and saves most of the time.
"""

import io
import tarfile
from pathlib import Path

# What comes back from a lent machine is at most 8 files of 16 MiB; results, log, probe and profiles take five.
_PART_BYTES, _PARTS = 15 * 2**20, 2
_PREFIX = "cache.tar."


def pack(folder: Path, out: Path) -> None:
    """Writes `out`/cache.tar.0of2 and so on: the smallest files first, as many as fit."""
    for old in out.glob(f"{_PREFIX}*"):
        old.unlink()
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-atime")]
    stream, room = io.BytesIO(), _PART_BYTES * _PARTS - 2**20
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(files, key=lambda path: (path.stat().st_size, path.name)):
            if stream.tell() + path.stat().st_size > room:
                break
            tar.add(path, arcname=str(path.relative_to(folder)))
    data = stream.getvalue()
    begins = range(0, len(data) if files else 0, _PART_BYTES)
    for part, begin in enumerate(begins):
        (out / f"{_PREFIX}{part}of{len(begins)}").write_bytes(data[begin : begin + _PART_BYTES])


def unpack(out: Path, folder: Path) -> None:
    """Restores what `pack` left in `out`, or does nothing where it left nothing or the parts are incomplete."""
    parts = sorted(out.glob(f"{_PREFIX}*"))
    if not parts:
        return
    if not parts[0].name.endswith(f"0of{len(parts)}"):
        print(f"the carried compilation cache is not used: only {', '.join(path.name for path in parts)} came along")
        return
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in parts)), mode="r") as tar:
        for member in tar:  # not `extractall`, whose `filter` Python has from 3.11.4 on
            target, content = folder / member.name, tar.extractfile(member)
            if content and target.resolve().is_relative_to(folder.resolve()):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
