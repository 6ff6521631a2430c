"""Memory in huge pages where the system has them: weights, the KV cache, large outputs of kernels.

A core that streams weights through pages of 4 KiB spends a part of its time on their addresses, and
one that gets new pages for every output of a long prompt spends a tenth on clearing them.

Knows: mappings. Does not know: what lies in them.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import TypeAlias

import torch

Empty: TypeAlias = Callable[[Sequence[int], torch.dtype], torch.Tensor]

HUGE = 2 << 20
KEPT_BYTES = 1 << 20
"""What is smaller the C library keeps by itself."""


def zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, which take no memory until they are written and give it back as
    soon as nobody holds them. OSError."""
    if num_bytes < HUGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    return torch.frombuffer(_pages(num_bytes), dtype=torch.uint8)  # which keeps the mapping


def _pages(num_bytes: int) -> mmap.mmap:
    # the kernel itself aligns mappings of this size to huge pages (Linux 6.7 and later)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _references(kept: Sequence[object]) -> list[int]:
    return [sys.getrefcount(one) for one in kept]


FREE = _references([object()])[0]
"""Of a buffer that no tensor holds: the list's, and those of the question itself."""


class Buffers:
    """Memory for outputs: what no tensor holds any more is given out again as it is. At most
    twice the bytes are kept that tensors ever held at a time."""

    def __init__(self) -> None:
        self._kept: list[mmap.mmap] = []
        self.most = 0
        """Most bytes that tensors held when a new buffer was made, it included."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty, contiguous. OSError where there is no memory."""
        count = prod(shape)
        if count * dtype.itemsize < KEPT_BYTES:
            return torch.empty(shape, dtype=dtype)
        pages = self._take(count * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)

    def _take(self, num_bytes: int) -> mmap.mmap:
        num_bytes = -(-num_bytes // HUGE) * HUGE
        counts = _references(self._kept)
        free = [pages for pages, n in zip(self._kept, counts, strict=True) if n == FREE]
        fitting = [pages for pages in free if num_bytes <= len(pages) <= 2 * num_bytes]
        pages = min(fitting, key=len) if fitting else _pages(num_bytes)
        if fitting:
            self._kept.remove(pages)
        self._kept.append(pages)  # in the order of their last use
        if not fitting:
            size = sum(map(len, self._kept))
            self.most = max(self.most, size - sum(map(len, free)))
            while size > 2 * self.most:
                gone = free.pop(0)
                self._kept.remove(gone)
                size -= len(gone)
        return pages

    def forget(self) -> None:
        """Lets go of all of them; tensors that hold one keep it."""
        self._kept.clear()
