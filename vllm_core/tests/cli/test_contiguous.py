"""What allocators without blocks waste, against a count step by step."""

from __future__ import annotations

import random

import pytest

from vllm_core.cli import contiguous
from vllm_core.cli.contiguous import Reserve


def counted(
    lengths: list[tuple[int, int]], reserve: Reserve, context: int, num_rows: int, slots: int
) -> tuple[float, float]:
    """The same by looking at every request in every step."""
    waiting = list(lengths)
    live: list[list[int]] = []  # [tokens held, steps left, slots reserved]
    tokens = reserved = num_live = steps = 0
    while True:
        while waiting:
            need = reserve(*waiting[0], context)
            if len(live) == num_rows or sum(r for _, _, r in live) + need > slots:
                break
            prompt, output = waiting.pop(0)
            live.append([prompt, output, need])
        if not waiting:
            return 1 - tokens / reserved, num_live / steps
        tokens += sum(held for held, _, _ in live)
        reserved += sum(r for _, _, r in live)
        num_live += len(live)
        steps += 1
        live = [[held + 1, left - 1, r] for held, left, r in live if left > 1]


@pytest.mark.parametrize("name", contiguous.ALLOCATORS)
@pytest.mark.parametrize("num_rows", [3, 1000])
def test_the_sums_from_end_to_end_are_those_of_every_step(name: str, num_rows: int) -> None:
    draw = random.Random(5)
    lengths = [(draw.randint(1, 30), draw.randint(1, 30)) for _ in range(200)]
    reserve = contiguous.ALLOCATORS[name]
    found = contiguous.waste(lengths, reserve, 64, num_rows, 300)
    assert found == pytest.approx(counted(lengths, reserve, 64, num_rows, 300))


def test_a_run_that_reserves_the_context_is_empty_behind_the_sequence() -> None:
    # One at a time: 2, 3 and 4 tokens in 10 slots, until the second starts and none waits.
    found = contiguous.waste([(2, 3), (2, 3)], contiguous.reserve_context, 10, 8, 10)
    assert found == pytest.approx((1 - 9 / 30, 1.0))


@pytest.mark.parametrize(("output", "reserved"), [(1, 1), (2, 2), (25, 32), (32, 32), (33, 64)])
def test_the_power_of_two_covers_the_answer(output: int, reserved: int) -> None:
    assert contiguous.reserve_power_of_two(5, output, 2048) == 5 + reserved


def test_nothing_is_counted_when_nobody_waits() -> None:
    assert contiguous.waste([(2, 3)], contiguous.reserve_context, 10, 8, 10) == (0.0, 0.0)
