"""TensorBoard's event file, written by hand: a curve needs five fields of its messages, and no torch or TensorFlow.

The usual writers import whole frameworks where those are installed. Formats: the messages `Event`, `Summary` and
`SessionLog` of tensorflow/core/util/event.proto and framework/summary.proto in protobuf's wire encoding, framed as
tensorflow/core/lib/io/record_writer.h says, with the CRC-32C of RFC 3720 appendix B.4.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_CRC_TABLE = _crc_table()
_START = 1  # SessionLog.START: what the folder holds from this step on is void


class EventFile:
    """Scalars over steps in a new event file of a folder, flushed record by record."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Voids what other files of the folder hold after `resume_step`: those steps are about to be done again."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._write(_text(3, "brain.Event:2"))
        self._write(_varint(2, resume_step + 1) + _bytes(7, _varint(1, _START)))

    def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
        """Records scalars at a step."""
        values = (_bytes(1, _text(1, tag) + b"\x15" + struct.pack("<f", value)) for tag, value in scalars.items())
        self._write(_varint(2, step) + _bytes(5, b"".join(values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        self._file.write(record(b"\x09" + struct.pack("<d", time.time()) + fields))
        self._file.flush()


def record(data: bytes) -> bytes:
    """A TFRecord: length, its checksum, the data, their checksum."""
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _number(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _bytes(field: int, data: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())
