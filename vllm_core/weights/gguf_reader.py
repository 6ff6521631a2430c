"""Opens a GGUF file with the gguf library and refuses a damaged one.

Knows: what the library leaves unchecked. Does not know: what keys and tensors mean. Importing it
imports gguf.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType

from vllm_core.errors import ModelError, WeightError

_MAGIC = b"GGUF"


def open_gguf(path: Path) -> GGUFReader:
    """A reader whose metadata and tensors all lie inside the file.

    Raises ModelError for a file that is no GGUF or has an unknown layout, WeightError for a
    truncated one.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if magic != _MAGIC:
        raise ModelError(f"{path} is no GGUF file: it starts with {magic!r} instead of {_MAGIC!r}")
    try:
        reader = _CheckedReader(path)
    except EOFError:
        raise WeightError(
            f"{path} is truncated: it ends inside its contents; get it again"
        ) from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error
    _check(path, reader)
    return reader


def _check(path: Path, reader: GGUFReader) -> None:
    if reader.byte_order != "I":
        raise ModelError(f"{path} was written for a machine with the other byte order")
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise ModelError(
            f"{path} is one of {parts.contents()} parts; join them with llama-gguf-split --merge"
        )
    tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    for left, right in pairwise(tensors):
        if left.data_offset + left.n_bytes > right.data_offset:
            raise WeightError(f"tensors {left.name!r} and {right.name!r} of {path} overlap")


class _CheckedReader(GGUFReader):
    """The library's reader, which reads past the end of a file in silence, and slowly.

    Two of its steps are replaced: `_get` is bounded by the file and slices a plain array (slicing
    np.memmap 150,000 times costs a second), and an array of numbers is one slice instead of one per
    number.
    """

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        stop = offset + kind.itemsize * int(count)
        if stop > self.data.size:
            raise EOFError
        if "_plain" not in self.__dict__:
            self._plain = self.data.view(np.ndarray)
        order = override_order or self.byte_order
        return self._plain[offset:stop].view(kind.newbyteorder(order))

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            raw_item = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            item = GGUFValueType(raw_item[0])
            if item in self.gguf_scalar_to_np:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[item], length[0])
                parts = [raw_item, length, values]
                return 12 + values.nbytes, parts, [2], [GGUFValueType.ARRAY, item]
        return super()._get_field_parts(orig_offs, raw_type)
