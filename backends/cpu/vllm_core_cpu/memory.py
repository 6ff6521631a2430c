"""Memory that is read from end to end in every step, in huge pages where the system has them.

A core that streams weights through pages of 4 KiB spends a part of its time on their addresses.

Knows: mappings, alignment. Does not know: what lies in them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

HUGE = 2 << 20
CHUNK = 64 << 20
ALIGNMENT = 64


def zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, which take no memory until they are written. OSError."""
    if num_bytes < HUGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping
    begin = -whole.data_ptr() % HUGE
    return whole[begin : begin + num_bytes]


class Chunks:
    """Pieces of large mappings, so that small weights share huge pages too."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], aligned to a line of the cache; it lives as long as anything of its
        chunk does."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._rest):
            if size >= CHUNK // 4:  # leaves the rest to those that fit
                return zeros(size)[:num_bytes]
            self._rest = zeros(CHUNK)
        piece, self._rest = self._rest[:num_bytes], self._rest[size:]
        return piece
