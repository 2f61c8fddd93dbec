"""Reads a program that XLA has compiled: its kernels, how often each runs, what it moves and multiplies.

From the text of the optimized HLO, because nothing else shows it: XLA's own cost analysis counts the body of a loop
once. Every operation of the program and of its loops is one kernel, except those that only name or regroup buffers.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
# cuBLAS and cuBLASLt, in 16 and in 8 bits: `__cublas$gemm`, `__cublas$lt$matmul`, `__cublas$lt$matmul$f8`.
_CUBLAS = 'custom_call_target="__cublas$'
# Devices that exchange data. `[8,4]<=[32]` is 8 groups of 4, `{{0,1},{2,3}}` 2 of 2, `mesh['a'=8,'b'=4] {'b'}` 8 of 4.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")


class Kernel(NamedTuple):
    """One operation that the device runs."""

    name: str  # XLA's
    source: str  # the operation of jax that it came from, with its module
    operation: str  # HLO's name of it, or the target of a custom call
    shape: str  # of its result, as HLO writes it
    times: int  # how often one run of the program runs it
    bytes: int  # read and written each time
    flops: int  # of its matmuls each time
    devices: int  # that exchange data in it, at least 1
    overlapped: bool  # whether matmuls run between its start and its end

    @property
    def collective(self) -> str:
        """The kind of communication, empty for what happens on the device."""
        kind = self.operation.removesuffix("-start")
        return kind if kind in _COLLECTIVES else ""

    @property
    def received(self) -> float:
        """Bytes that a device gets from others each time, by a ring: of a whole array all but its own part."""
        size, others = nbytes(self.shape), (self.devices - 1) / self.devices
        if self.collective in ("all-gather", "reduce-scatter") and self.operation.endswith("-start"):
            size = size * self.devices / (self.devices + 1)  # its result names the whole array and a part
        elif self.collective == "reduce-scatter":
            size *= self.devices
        return size * others * (2 if self.collective == "all-reduce" else 1)

    @property
    def attention(self) -> bool:
        """Whether it is one of cuDNN's fused attentions."""
        return "fmha" in self.operation

    @property
    def product(self) -> bool:
        """Whether it multiplies matrices, a fused attention included."""
        return self.flops > 0 or self.attention


class _Operation(NamedTuple):
    name: str
    shape: str
    operation: str
    operands: list[str]
    line: str

    def called(self, attribute: str) -> str:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.line)
        return found[1] if found else ""


_Computations = dict[str, list[_Operation]]


def kernels(text: str) -> list[Kernel]:
    """All kernels of one run of a compiled program, `compiled.as_text()`.

    Raises:
        ValueError: for a loop of unknown length.
    """
    computations: _Computations = {}
    entry = ""
    for block in text.split("\n\n"):
        head, *lines = block.strip("\n").split("\n")
        named = re.match(r"(ENTRY )?%?([\w.\-]+) \(", head)
        if named:
            computations[named[2]] = [operation for line in lines if (operation := _read(line))]
            entry = named[2] if named[1] else entry
    return list(_run(computations, entry, 1))


def cudnn_calls(text: str) -> int:
    """How many calls of cuDNN's attention the text of a compiled program has; those in a loop count once."""
    return text.count('custom_call_target="__cudnn$fmha')


def nbytes(shape: str) -> int:
    """Bytes of an array or a tuple of them, as HLO writes shapes."""
    return sum(_BYTES.get(dtype, 4) * math.prod(_sizes(dims)) for dtype, dims in _ARRAY.findall(shape))


def dimensions(shape: str) -> list[int]:
    """Dimensions of an array, or of the first of a tuple of them."""
    return _sizes(_ARRAY.findall(shape)[0][1])


def _sizes(dims: str) -> list[int]:
    return [int(size) for size in dims.split(",") if size]


def _read(line: str) -> _Operation | None:
    found = _OPERATION.match(line)
    if not found:
        return None
    depth, end = 1, found.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    return _Operation(found[1], found[2], found[3], re.findall(r"%([\w.\-]+)", line[found.end() : end]), line)


def _run(computations: _Computations, name: str, times: int) -> Iterator[Kernel]:
    shapes = {operation.name: operation.shape for operation in computations[name]}
    for place, operation in enumerate(computations[name]):
        kind = operation.operation
        if kind in _FREE or kind.endswith("-done"):
            continue
        if kind == "while":
            length = re.search(r'known_trip_count":\{"n":"(\d+)"', operation.line)
            if length is None:
                raise ValueError(f"the loop {operation.name} has no known length")
            yield from _run(computations, operation.called("body"), times * int(length[1]))
            continue
        body = computations.get(operation.called("calls"), [])
        # The result of what is started and runs in parallel with other work names its operands, too.
        operands = [] if kind.endswith("-start") else dict.fromkeys(operation.operands)
        read = sum(nbytes(shapes.get(operand, "")) for operand in operands)
        source, target = (re.search(rf'{key}="([^"]*)"', operation.line) for key in ("op_name", "custom_call_target"))
        yield Kernel(
            name=operation.name,
            source=source[1] if source else "",
            operation=target[1] if target else kind,
            shape=operation.shape,
            times=times,
            bytes=nbytes(operation.shape) - _workspace([operation, *body]) + read - _untouched(body),
            flops=_flops(computations, operation, shapes),
            devices=_devices(operation.line),
            overlapped=_overlapped(computations, computations[name][place:], shapes),
        )


def _devices(line: str) -> int:
    found = _GROUPS.search(line)
    if not found:
        return 1
    count, listed, mesh, axes = found.groups()
    if mesh:
        sizes = dict(axis.split("=") for axis in mesh.split(","))
        return math.prod(int(sizes[axis]) for axis in axes.split(","))
    return int(count) if count else len(listed.split(","))


def _overlapped(computations: _Computations, started: list[_Operation], shapes: dict[str, str]) -> bool:
    """Whether a matmul runs after the first operation has started and before it is done."""
    first, *others = started
    if not first.operation.endswith("-start"):
        return False
    ends = (i for i, each in enumerate(others) if each.operation.endswith("-done") and first.name in each.operands)
    between = others[: next(ends, 0)]
    return any(_flops(computations, each, shapes) or "fmha" in each.line for each in between)


def _untouched(body: list[_Operation]) -> int:
    """What a fusion is given or returns whole and only slices, or updates in place."""
    shapes = {operation.name: operation.shape for operation in body}
    spared = 0
    for operation in body:
        if operation.operation == "dynamic-update-slice":
            spared += 2 * nbytes(operation.shape) - nbytes(shapes[operation.operands[1]])
        users = _users(body, operation.name)
        if operation.operation == "parameter" and users and all(other.operation in _SLICES for other in users):
            whole = math.prod(dimensions(operation.shape))
            read = sum(math.prod(dimensions(other.shape)) for other in users)
            spared += nbytes(operation.shape) * max(0, whole - read) // max(1, whole)
    return spared


def _users(body: list[_Operation], name: str) -> list[_Operation]:
    """Operations that read a value, which may have got another shape or dtype on the way."""
    users = []
    for other in (each for each in body if name in each.operands):
        users += _users(body, other.name) if other.operation in ("bitcast", "convert") else [other]
    return users


def _workspace(calls: list[_Operation]) -> int:
    """Bytes of cuBLAS's scratch space, which is the last array of such a call's result and holds no data."""
    if not any(_CUBLAS in call.line for call in calls):
        return 0
    *outputs, last = _ARRAY.findall(calls[0].shape)
    return nbytes(f"s8[{last[1]}]") if outputs and last[0] == "s8" else 0


def _flops(computations: _Computations, operation: _Operation, shapes: dict[str, str]) -> int:
    """Flops of the matmuls of an operation and of all that it calls; `shapes` are those of its operands."""
    if operation.operation == "dot":
        return _product_flops(operation, shapes, r"lhs_contracting_dims=\{([\d,]*)\}")
    if _CUBLAS in operation.line:
        return _product_flops(operation, shapes, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
    body = computations.get(operation.called("calls"), [])
    inner = {each.name: each.shape for each in body}
    return sum(_flops(computations, each, inner) for each in body)


def _product_flops(operation: _Operation, shapes: dict[str, str], contracting: str) -> int:
    found = re.search(contracting, operation.line)
    left = dimensions(shapes[operation.operands[0]])
    depth = math.prod(left[i] for i in _sizes(found[1].replace('"', "") if found else ""))
    return 2 * depth * math.prod(dimensions(operation.shape))
