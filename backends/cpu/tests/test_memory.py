"""Memory in huge pages: zero, and gone with its holder.

Knows: memory.py. Does not know: weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_core_cpu import memory


@pytest.mark.parametrize("num_bytes", [1, 4096, memory.HUGE, memory.HUGE + 100, 9 * memory.HUGE])
def test_memory_is_zero_and_of_the_size_that_was_asked_for(num_bytes: int) -> None:
    found = memory.zeros(num_bytes)
    assert found.shape == (num_bytes,)
    assert not found.any()
    found[-1] = 7


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="NOT CHECKED: this system does not tell memory"
)
def test_what_nobody_holds_is_given_back_at_once() -> None:
    page, size = 4096, 32 << 20
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    for _ in range(4):
        memory.zeros(size).fill_(1)
    after = int(Path("/proc/self/statm").read_text().split()[1])
    assert (after - resident) * page < size


def test_more_memory_than_there_is_room_for_is_an_error() -> None:
    with pytest.raises((OSError, OverflowError, RuntimeError)):
        memory.zeros(1 << 62)
    assert torch.zeros(1).item() == 0


def test_a_buffer_that_no_tensor_holds_is_given_out_again() -> None:
    buffers = memory.Buffers()
    first = buffers.empty((3, 1 << 20), torch.bfloat16)
    view, at = first[1:, 5:], first.data_ptr()
    assert first.is_contiguous() and first.shape == (3, 1 << 20)
    del first
    other = buffers.empty((3, 1 << 20), torch.bfloat16)
    assert other.data_ptr() != at, "a view still holds the first one"
    del view
    assert buffers.empty((1 << 20,), torch.float32).data_ptr() == at


def test_no_more_is_kept_than_twice_what_was_held_at_a_time() -> None:
    buffers = memory.Buffers()
    for size in (1, 2, 3, 40, 2, 9, 4, 9, 39, 1, 40):
        pair = [buffers.empty((size, memory.HUGE), torch.uint8) for _ in range(2)]
        pair[1][-1, -1] = 1
        del pair
        kept = sum(len(pages) for pages in buffers._kept)
        assert kept <= 2 * buffers.most <= 160 * memory.HUGE
    buffers.forget()
    assert not buffers._kept


def test_a_large_buffer_does_not_serve_a_small_tensor() -> None:
    buffers = memory.Buffers()
    large = buffers.empty((50, memory.HUGE), torch.uint8)
    del large
    small = buffers.empty((1, memory.HUGE), torch.uint8)
    assert small.untyped_storage().nbytes() == memory.HUGE
