"""TensorBoard's event files, written by hand: scalars need five fields of its messages.

tensorboardX 2.6.5 imports torch where it is installed, and blocks its caller for ever once the disk is full. Formats:
`Event`, `Summary` and `SessionLog` of tensorflow/core/util/event.proto and framework/summary.proto, in the records of
tensorflow/core/lib/io/record_writer.h with the CRC-32C of RFC 3720 appendix B.4.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from jaxllm.data.durable import Appended


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_CRC_TABLE = _crc_table()
_START = 1  # SessionLog.START: what the folder holds from this step on is void
_PREFIX = "events.out.tfevents."


class EventFile:
    """Scalars over steps in a new event file of a folder, record by record."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Voids what other files of the folder hold after `resume_step`: those steps are about to be done again."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{_PREFIX}{_time_after(folder):017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(folder / name)
        self._write(_field(3, b"brain.Event:2"))
        self._write(_field(2, resume_step + 1) + _field(7, _field(1, _START)))

    def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """Records scalars at a step."""
        values = (_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value) for tag, value in scalars.items())
        self._write(_field(2, step) + _field(5, b"".join(_field(1, value) for value in values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        data = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))


def _time_after(folder: Path) -> float:
    """Now, or just after the newest file: TensorBoard reads files by name, and a clock can be set back."""
    names = (path.name.removeprefix(_PREFIX)[:17] for path in folder.glob(f"{_PREFIX}*"))
    times = (float(name) for name in names if name.replace(".", "", 1).isdecimal())
    return max([time.time(), *(earlier + 1e-6 for earlier in times)])


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, value: int | bytes) -> bytes:
    """A field in protobuf's wire encoding: an integer, or bytes behind their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value
