"""Memory that is read from end to end in every step, in huge pages where the system has them.

A core that streams weights through pages of 4 KiB spends a part of its time on their addresses.

Knows: mappings. Does not know: what lies in them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

HUGE = 2 << 20


def zeros(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, which take no memory until they are written and give it back as
    soon as nobody holds them. OSError."""
    if num_bytes < HUGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    # the kernel itself aligns mappings of this size to huge pages (Linux 6.7 and later)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)  # which keeps the mapping
