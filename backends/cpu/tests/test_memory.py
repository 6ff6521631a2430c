"""Memory in huge pages: aligned, zero, apart.

Knows: memory.py. Does not know: weights.
"""

from __future__ import annotations

import pytest
import torch

from vllm_core_cpu import memory


@pytest.mark.parametrize("num_bytes", [1, 4096, memory.HUGE, memory.HUGE + 100, 9 * memory.HUGE])
def test_memory_is_zero_and_of_the_size_that_was_asked_for(num_bytes: int) -> None:
    found = memory.zeros(num_bytes)
    assert found.shape == (num_bytes,)
    assert not found.any()
    found[-1] = 7
    if num_bytes >= memory.HUGE:
        assert found.data_ptr() % memory.HUGE == 0


def test_pieces_of_chunks_do_not_overlap_and_outlive_their_chunks() -> None:
    chunks = memory.Chunks()
    sizes = [100, 5 << 20, 3, 17 << 20, 12 << 20, 15 << 20, 15 << 20, 15 << 20, 15 << 20]
    pieces = [chunks.take(size) for size in sizes]
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    del chunks
    for value, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (size,)
        assert piece.data_ptr() % memory.ALIGNMENT == 0
        assert bool((piece == value).all())


def test_more_memory_than_there_is_room_for_is_an_error() -> None:
    with pytest.raises((OSError, OverflowError, RuntimeError)):
        memory.zeros(1 << 62)
    assert torch.zeros(1).item() == 0
