"""A directory of safetensors files as a parameter tree, and back: one list of `Entry` drives both.

Reading fills one preallocated stack per parameter, piece by piece on several threads, so that no tensor exists twice
as a whole. Each piece opens its file again: the pages of a mapped file count as the process's memory until it is
closed. Out of scope: the names of a family, config.json.
"""

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.interop import InteropError, check_readable
from jaxllm.models.model import listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Names of safetensors' dtypes that a parameter may have.
_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_PIECE_BYTES = 1 << 25  # of a file, read through one mapping by one thread
_THREADS = min(8, os.cpu_count() or 1)
# Rows read and transposed at once, so that NumPy writes whole cache lines from rows in the cache.
# Rows of a multiple of 4096 bytes would compete for the same few cache lines; the padding spreads them.
_ROWS, _PAD = 128, 32


class Entry(NamedTuple):
    """One parameter of ours and the tensor or tensors that hold it."""

    path: tuple[str, ...]  # its keys in the parameter tree
    name: str  # the tensor; `{}` stands for the number of the layer of a stacked parameter
    layers: int = 0  # how many layers are stacked; 0 for a parameter that is not stacked
    transposed: bool = False  # whether the last two axes are swapped in the file (kernels are [out, in] there)

    def tensors(self) -> list[str]:
        """Names of its tensors, in the order of the stack."""
        return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]


_File = dict[str, tuple[Entry, int]]  # its tensors, each with its parameter and layer
_Leaves = Mapping[tuple[str, ...], Any]


class _Info(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a directory by name; their data are read on demand.

    Attributes:
        folder: the directory.
        info: file, shape and safetensors dtype of each tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the headers of model.safetensors, or of its index's shards; InteropError for a damaged file."""
        self.folder = Path(folder)
        self.info = dict(self._headers())
        self._alias: dict[str, str] = {}

    def alias(self, name: str, tensor: str) -> None:
        """Lets an absent tensor be read as another: files hold only one of the names of a shared tensor."""
        self.info[name], self._alias[name] = self.info[tensor], tensor

    @contextlib.contextmanager
    def tensor(self, name: str) -> Iterator[Any]:
        """A tensor whose slices of rows are copied out of the file; the file is open until the block ends."""
        with _open(self.info[name].file) as file:
            yield file.get_slice(self._alias.get(name, name))

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal in shape, dtype and every bit."""
        if self.info[first][1:] != self.info[second][1:]:
            return False
        for start, stop in _pieces(self.info[first]):
            with self.tensor(first) as one, self.tensor(second) as other:
                if any(one[a:b].tobytes() != other[a:b].tobytes() for a, b in _steps(start, stop, _ROWS)):
                    return False
        return True

    def _headers(self) -> Iterator[tuple[str, _Info]]:
        for path, wanted in self._shards().items():
            with _open(path) as file:
                present = set(file.keys())
                for name in wanted or sorted(present):
                    if name not in present:
                        raise InteropError(f"{self.folder / INDEX} places tensor {name} in {path.name}, which lacks it")
                    part = file.get_slice(name)
                    yield name, _Info(path, tuple(part.get_shape()), part.get_dtype())

    def _shards(self) -> dict[Path, list[str]]:
        """Files, each with the tensors that the index places there; an empty list is all of them."""
        if (self.folder / SINGLE).is_file():
            return {self.folder / SINGLE: []}
        if not (self.folder / INDEX).is_file():
            raise InteropError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{_hint(self.folder)}")
        placed = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
            raise InteropError(f"{self.folder / INDEX} has no weight_map of tensor names to files")
        shards: dict[Path, list[str]] = {}
        for name, file in placed.items():
            if file in ("", ".", "..") or "/" in file or "\\" in file:
                raise InteropError(
                    f"{self.folder / INDEX} places tensor {name} in {file!r}, which is not a file of its folder; files "
                    f"elsewhere are not read"
                )
            shards.setdefault(self.folder / file, []).append(name)
        if missing := [path.name for path in shards if not path.is_file()]:
            raise InteropError(f"{self.folder} lacks {listed(missing)}, which {INDEX} names; fetch it again")
        return shards


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InteropError when it is missing, cannot be read or holds no object."""
    if not path.exists():
        raise InteropError(f"no {path.name} in {path.parent}; give what save_pretrained wrote; load_run opens a run")
    check_readable(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InteropError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InteropError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_params(
    files: TensorFiles, entries: Sequence[Entry], abstract: Any, *, dtype: Any = None, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """The parameter tree that `entries` describe, on the default device or by the shardings of `abstract`.

    `abstract` is the tree of shapes of `jaxllm.models.abstract_params`. `dtype` None takes the narrowest that holds
    every tensor exactly. Tensors with a name that matches `ignored` may be there without a meaning. An InteropError
    names the tensors that are missing, unexpected or of another shape or dtype.
    """
    leaves = flatten_dict(abstract)
    _check(files, entries, leaves, ignored)
    if dtype is None:
        found = {files.info[name].dtype for entry in entries for name in entry.tensors()}
        dtype = jnp.result_type(*(_DTYPES[kind] for kind in found))
    params: dict[tuple[str, ...], jax.Array] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for entry in entries:
            like: Any = leaves[entry.path]
            if like.sharding is not None:
                params[entry.path] = _in_parts(files, entry, like, jnp.dtype(dtype))
                continue
            stack = _empty(like, jnp.dtype(dtype))
            outs = stack if entry.layers else stack[None]
            pieces = [
                pool.submit(_fill, out, files, name, entry.transposed, *piece)
                for out, name in zip(outs, entry.tensors(), strict=True)
                for piece in _pieces(files.info[name])
            ]
            for piece in pieces:
                piece.result()
            params[entry.path] = jax.device_put(stack)
    return unflatten_dict(params)


def write_params(
    folder: str | Path,
    entries: Sequence[Entry],
    params: Any,
    *,
    dtype: Any = None,
    shard_bytes: int = 5_000_000_000,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes model.safetensors, or shards and their index when it would exceed `shard_bytes`.

    Files of an earlier export are replaced once all new ones are whole, and stay after an error. `dtype` None keeps
    each parameter's. `texts` are other files of the export by name, such as config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves, texts = flatten_dict(params), dict(texts or {})
    plan = _plan(entries, leaves, dtype, shard_bytes)
    count = len(plan)
    names = [SINGLE]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        placed = {name: file for tensors, file in zip(plan, names, strict=True) for name in tensors}
        total = sum(_size(entry, leaves, dtype) for tensors in plan for entry, _ in tensors.values())
        texts[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2)
    new = [folder / name for name in (*names, *texts)]
    partial = [path.with_name(f"{path.name}.partial") for path in new]
    try:
        for path, tensors in zip(partial, plan, strict=False):
            _save(path, {name: _tensor(entry, i, leaves, dtype) for name, (entry, i) in tensors.items()})
        for path, text in zip(partial[count:], texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        for path, whole in zip(partial, new, strict=True):
            path.replace(whole)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    for old in (folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if old not in new:
            old.unlink(missing_ok=True)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        check_readable(path)
        raise InteropError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(arrays, str(path), metadata={"format": "pt"})
        path.chmod(mode)  # as of any new file; safetensors 0.8.0 lets only its owner read it
    except SafetensorError as error:
        raise InteropError(f"cannot write {path} ({error}); choose a folder with free space") from None


def _hint(folder: Path) -> str:
    if not folder.is_dir():
        return "; there is no such directory"
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        return f", only {pickles[0]}, a pickle; save it again with safe_serialization=True"
    return "; give the directory that save_pretrained wrote"


def _check(files: TensorFiles, entries: Sequence[Entry], leaves: _Leaves, ignored: Sequence[str]) -> None:
    layers = max(entry.layers for entry in entries)
    if layers > len(files.info):  # the names of so many would take minutes to make
        raise InteropError(
            f"config.json makes {layers} layers, but the files of {files.folder} hold {len(files.info)} tensors"
        )
    wanted = {name: entry for entry in entries for name in entry.tensors()}
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or "(?!)")
    missing = [name for name in wanted if name not in files.info]
    unexpected = [name for name in files.info if name not in wanted and not unused.fullmatch(name)]
    wrong = []
    for name in (name for name in wanted if name in files.info):
        shape = _file_shape(wanted[name], leaves[wanted[name].path].shape)
        found = files.info[name]
        if found.shape != shape:
            wrong.append(f"{name} {list(found.shape)}, config.json makes it {list(shape)}")
        elif found.dtype not in _DTYPES:
            wrong.append(f"{name} is {found.dtype}; only {', '.join(_DTYPES)} are read, no quantised files")
    groups = (("missing tensors", missing), ("unexpected tensors", unexpected), ("wrong shape or dtype", wrong))
    if problems := [f"{title}: {listed(names)}" for title, names in groups if names]:
        raise InteropError(f"{files.folder} does not fit its config.json: " + "; ".join(problems))


def _file_shape(entry: Entry, shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape[1:] if entry.layers else shape)
    return (*shape[:-2], shape[-1], shape[-2]) if entry.transposed else shape


def _empty(like: Any, dtype: np.dtype) -> np.ndarray:
    """An array of the shape of `like`, with the alignment that lets XLA's CPU client use it without a copy."""
    size = like.size * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(like.shape)


def _pieces(info: _Info) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about _PIECE_BYTES."""
    row = math.prod(info.shape[1:]) * jnp.dtype(_DTYPES.get(info.dtype, jnp.float64)).itemsize
    return _steps(0, info.shape[0], max(1, _PIECE_BYTES // (row * _ROWS)) * _ROWS)


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return itertools.pairwise([*range(start, stop, step), stop])


def _fill(out: np.ndarray, files: TensorFiles, name: str, transposed: bool, start: int, stop: int) -> None:
    """Copies rows start..stop of a tensor into `out`, as columns when it is transposed."""
    scratch = np.empty((_ROWS, out.shape[0] + _PAD), out.dtype)[:, :-_PAD] if transposed else out
    with files.tensor(name) as tensor:
        for first, last in _steps(start, stop, _ROWS):
            if transposed:
                _copy(scratch[: last - first], tensor[first:last])
                _bits(out)[:, first:last] = _bits(scratch[: last - first]).T
            else:
                _copy(out[first:last], tensor[first:last])


def _in_parts(files: TensorFiles, entry: Entry, like: Any, dtype: np.dtype) -> jax.Array:
    """A parameter by its sharding, of which each device reads its part."""

    def part(index: Any) -> np.ndarray:
        names = entry.tensors()[index[0] if entry.layers else slice(None)]
        order = list(index[1:] if entry.layers else index)
        if entry.transposed:
            order[-2:] = reversed(order[-2:])
        tensors = []
        for name in names:
            with files.tensor(name) as tensor:
                found = tensor[tuple(order)].astype(dtype)
            tensors.append(found.swapaxes(-1, -2) if entry.transposed else found)
        return np.stack(tensors) if entry.layers else tensors[0]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    if (part.dtype, out.dtype) == (jnp.bfloat16, jnp.float32):
        # The upper half of the bits. NumPy's conversion by the extension type would block all other threads.
        np.left_shift(part.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    elif part.dtype == out.dtype:
        _bits(out)[...] = _bits(part)
    else:
        out[...] = part


def _bits(array: np.ndarray) -> np.ndarray:
    """Half-precision floats as integers, which NumPy moves faster than its extension types."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _tensor(entry: Entry, layer: int, leaves: _Leaves, dtype: Any) -> np.ndarray:
    array = np.asarray(leaves[entry.path])
    array = array[layer] if entry.layers else array
    array = array if dtype is None else array.astype(dtype)
    return np.ascontiguousarray(array.swapaxes(-1, -2) if entry.transposed else array)


def _size(entry: Entry, leaves: _Leaves, dtype: Any) -> int:
    leaf = leaves[entry.path]
    return leaf.size // max(entry.layers, 1) * jnp.dtype(leaf.dtype if dtype is None else dtype).itemsize


def _plan(entries: Sequence[Entry], leaves: _Leaves, dtype: Any, shard_bytes: int) -> list[_File]:
    """Tensors of each file, layer by layer."""
    ordered = [(entry, i, name) for entry in entries for i, name in enumerate(entry.tensors())]
    ordered.sort(key=lambda item: (item[0].layers > 0, item[1]))
    shards: list[_File] = [{}]
    used = 0
    for entry, i, name in ordered:
        size = _size(entry, leaves, dtype)
        if used + size > shard_bytes and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = (entry, i)
        used += size
    return shards
