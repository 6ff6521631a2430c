"""Reads checkpoint tensors by name from safetensors files, one at a time.

Knows: safetensors headers, shards and their index. Does not know: which model they belong to.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import struct
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np

from vllm_core.errors import ModelError, WeightError
from vllm_core.ops import quantized

if TYPE_CHECKING:
    import numpy.typing as npt

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors format itself sets."""

RESIDENT_BYTES = 128 << 20
"""Of a file, once read, that may stay in memory."""

_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
"""Name in the file -> (numpy or ml_dtypes name, bytes per element)."""


@dataclass(frozen=True)
class CodeFormat:
    """How a tensor of few bits is stored: a scheme of `ops.quantized`, and its groups."""

    scheme: str
    group: int
    has_mins: bool = False

    def num_bytes(self, rows: int, size: int) -> int:
        """On a device that keeps the codes."""
        return quantized.num_bytes(self.scheme, rows, size, self.group, self.has_mins)


class WeightSource(Protocol):
    """The tensors of one checkpoint under their Hugging Face names."""

    def names(self) -> list[str]:
        """Every tensor, e.g. `model.layers.0.self_attn.q_proj.weight`."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """The dtype that `load` returns: "float32", "bfloat16", "float16", ..."""
        ...

    def num_bytes(self) -> int:
        """Bytes of all tensors as they lie in the checkpoint."""
        ...

    def load(self, name: str) -> npt.NDArray[Any]:
        """One tensor, C-contiguous, to be read only: it may be the file's own pages. bfloat16 as
        `ml_dtypes.bfloat16`."""
        ...

    def codes(self, name: str) -> CodeFormat | None:
        """The format of a tensor that `load` would have to dequantise; None where there is
        nothing to keep."""
        ...

    def load_codes(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """The codes, scales and perhaps mins of such a tensor, as `ops.quantized` has them."""
        ...


@dataclass(frozen=True)
class _Entry:
    """One tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsSource:
    """A WeightSource over one or several safetensors files; tensors are read when asked for."""

    def __init__(self, shards: Mapping[Path, Mapping[str, _Entry]]) -> None:
        self._entries: dict[str, tuple[Path, _Entry]] = {}
        self._files: dict[Path, _Mapping] = {}
        for path, entries in shards.items():
            for name, entry in entries.items():
                if name in self._entries:
                    raise WeightError(
                        f"tensor {name!r} stands in two files, {self._entries[name][0].name} and "
                        f"{path.name}; remove the file that does not belong to the checkpoint"
                    )
                self._entries[name] = (path, entry)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def dtype(self, name: str) -> str:
        return _DTYPES[self._find(name)[1].dtype][0]

    def num_bytes(self) -> int:
        return sum(entry.stop - entry.start for _, entry in self._entries.values())

    def load(self, name: str) -> npt.NDArray[Any]:
        import ml_dtypes  # noqa: F401  numpy knows the name "bfloat16" only once this is imported

        path, entry = self._find(name)
        if entry.dtype.startswith("F8"):
            raise WeightError(
                f"tensor {name!r} of {path.name} has dtype {entry.dtype}, which needs quantised "
                "compute; use a checkpoint in bfloat16, float16 or float32"
            )
        kind, size = _DTYPES[entry.dtype]
        count = (entry.stop - entry.start) // size
        with _as_weight_error(path):
            array = self._open(path).numbers(entry.start, count, np.dtype(kind))
        return array.reshape(entry.shape)

    def codes(self, name: str) -> CodeFormat | None:
        return None

    def load_codes(self, name: str) -> dict[str, npt.NDArray[Any]]:
        raise WeightError(f"tensor {name!r} is stored in plain numbers, not in codes")

    def _find(self, name: str) -> tuple[Path, _Entry]:
        try:
            return self._entries[name]
        except KeyError:
            raise WeightError(f"the checkpoint holds no tensor {name!r}") from None

    def _open(self, path: Path) -> _Mapping:
        if path not in self._files:
            self._files[path] = _Mapping(path)
        return self._files[path]


class _Mapping:
    """The data of one file, mapped: what is read is not copied, and what was read a while ago gives
    its memory back, so that loading needs little beside what is loaded.

    The library's own reader copies each tensor for numpy, which doubles the time of loading.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # a private mapping: nothing can reach the file, and torch takes no memory that it
            # cannot write
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._begin = 8 + struct.unpack_from("<Q", self._bytes)[0]
        self._recent: deque[tuple[int, int]] = deque()
        self._recent_bytes = 0

    def numbers(self, start: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """`count` numbers from byte `start` of the data on."""
        begin = self._begin + start
        self._forget()
        self._recent.append((begin, count * dtype.itemsize))
        self._recent_bytes += count * dtype.itemsize
        return np.frombuffer(self._bytes, dtype, count, begin)

    def _forget(self) -> None:
        """Pages that are in the file can go at any time: who still looks reads them anew."""
        while self._recent_bytes > RESIDENT_BYTES and len(self._recent) > 1:
            begin, size = self._recent.popleft()
            self._recent_bytes -= size
            if hasattr(mmap, "MADV_DONTNEED"):
                page = mmap.PAGESIZE
                first, last = -(-begin // page) * page, (begin + size) // page * page
                if last > first:
                    self._bytes.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_safetensors(directory: Path) -> SafetensorsSource:
    """The safetensors checkpoint of a directory, every header checked before a tensor is read.

    Raises WeightError for a file that is damaged or missing, ModelError when there is none.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        return _open_indexed(directory, _read_index(index))
    single = directory / SINGLE_NAME
    paths = [single] if single.is_file() else safetensors_files(directory)
    if not paths:
        raise ModelError(_nothing_found(directory))
    return SafetensorsSource({path: read_header(path) for path in paths})


def safetensors_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory that can be a model's weights (adapters are none)."""
    return sorted(
        path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_")
    )


def read_header(path: Path) -> dict[str, _Entry]:
    """The tensors that a file declares; WeightError unless they fill it without gap or overlap."""
    try:
        with path.open("rb") as file:
            num_file_bytes = path.stat().st_size
            head = file.read(8)
            if len(head) < 8:
                raise WeightError(f"{path} is truncated: it has only {num_file_bytes} bytes")
            (num_header_bytes,) = struct.unpack("<Q", head)
            if num_header_bytes > MAX_HEADER_BYTES:
                raise WeightError(
                    f"{path} is no safetensors file: it claims a header of {num_header_bytes} bytes"
                )
            if 8 + num_header_bytes > num_file_bytes:
                raise WeightError(
                    f"{path} is truncated: its header needs {8 + num_header_bytes} bytes, "
                    f"the file has {num_file_bytes}; download it again"
                )
            text = file.read(num_header_bytes)
    except OSError as error:
        raise WeightError(f"cannot read {path}: {error.strerror or error}") from error
    entries = _parse_header(path, text)
    _check_layout(path, entries, num_file_bytes - 8 - num_header_bytes)
    return entries


def _parse_header(path: Path, text: bytes) -> dict[str, _Entry]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"the header of {path} is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise WeightError(f"the header of {path} must be a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse_entry(path, name, raw) for name, raw in header.items()}


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise ValueError(f"{name!r} stands in it {count} times")
    return dict(pairs)


def _parse_entry(path: Path, name: str, raw: object) -> _Entry:
    where = f"tensor {name!r} of {path}"
    if not isinstance(raw, dict):
        raise WeightError(f"{where} has no description, but {raw!r}")
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise WeightError(f"{where} has dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    if not _are_sizes(shape):
        raise WeightError(f"{where} has a shape that is no list of sizes: {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightError(f"{where} has data offsets that are no range: {offsets!r}")
    entry = _Entry(dtype, tuple(shape), *offsets)
    need = math.prod(shape) * _DTYPES[dtype][1]
    if entry.stop - entry.start != need:
        raise WeightError(
            f"{where} needs {need} bytes for shape {list(shape)} in {dtype}, "
            f"but its data offsets hold {entry.stop - entry.start}"
        )
    return entry


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_layout(path: Path, entries: Mapping[str, _Entry], num_data_bytes: int) -> None:
    stop, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < stop:
            raise WeightError(f"tensors {before!r} and {name!r} of {path} overlap")
        if entry.start > stop:
            raise WeightError(f"{path} has {entry.start - stop} unused bytes before {name!r}")
        stop, before = entry.stop, name
    if stop > num_data_bytes:
        raise WeightError(
            f"{path} is truncated: its tensors need {stop} bytes, the file holds {num_data_bytes}; "
            "download it again"
        )
    if stop < num_data_bytes:
        raise WeightError(f"{path} has {num_data_bytes - stop} bytes that belong to no tensor")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightError(f"cannot read {path}: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise WeightError(f"{path} places tensor {name!r} in {file!r}, which is no file name")
    return weight_map


def _open_indexed(directory: Path, weight_map: Mapping[str, str]) -> SafetensorsSource:
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise WeightError(
            f"{directory} lacks {len(missing)} of {len(files)} weight files that {INDEX_NAME} "
            f"names, the first is {missing[0]}; download it again"
        )
    headers = {file: read_header(directory / file) for file in files}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise WeightError(f"{INDEX_NAME} places tensor {name!r} in {file}, which lacks it")
    return SafetensorsSource({directory / file: header for file, header in headers.items()})


def _nothing_found(directory: Path) -> str:
    pickles = sorted(
        path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}")
    )
    if not pickles:
        return f"{directory} holds no weights: wanted {SINGLE_NAME}, {INDEX_NAME} or a GGUF file"
    return (
        f"{directory} holds only pickled weights ({pickles[0]}), which are refused because reading "
        "a pickle can run any code; where you trust it, load it with transformers' from_pretrained "
        "and write it with save_pretrained, which makes safetensors"
    )


@contextlib.contextmanager
def _as_weight_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise WeightError(f"cannot read {path}: {error}") from error
