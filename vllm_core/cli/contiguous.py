"""What a cache without blocks wastes: every request gets one run of slots for its whole life.

The three allocators that the PagedAttention paper (arXiv 2309.06180, section 6.1) compares with. No
slot is lost between runs here, which favours them: the paper's buddy allocator loses some.

Knows: lengths, reservations. Does not know: engines, blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

Reserve = Callable[[int, int, int], int]
"""(prompt length, answer length, context) -> slots reserved."""


def reserve_context(prompt: int, output: int, context: int) -> int:
    """Orca (Max): the whole context, since nobody knows how long the answer gets."""
    return context


def reserve_power_of_two(prompt: int, output: int, context: int) -> int:
    """Orca (Pow2): the answer's length, as if it were known to the next power of two."""
    return min(context, prompt + (1 << (output - 1).bit_length()))


def reserve_exactly(prompt: int, output: int, context: int) -> int:
    """Orca (Oracle): the answer's length, as if it were known; only not used yet."""
    return prompt + output


ALLOCATORS: dict[str, Reserve] = {
    "contiguous, whole context (Orca Max)": reserve_context,
    "contiguous, answer to a power of two (Orca Pow2)": reserve_power_of_two,
    "contiguous, answer known (Orca Oracle)": reserve_exactly,
}


def waste(
    lengths: Sequence[tuple[int, int]], reserve: Reserve, context: int, num_rows: int, slots: int
) -> tuple[float, float]:
    """(share of reserved slots that hold nothing, mean live requests) while requests wait.

    First come, first served; a prompt is computed in one step, every later step adds a token.
    Between two ends nothing changes but that each live request grows by a token per step, so the
    sums go from end to end. `slots` must hold one context.
    """
    live: list[tuple[int, int, int]] = []  # (step at which it ends, slots reserved, final length)
    now = reserved = used = 0
    sum_reserved = sum_used = sum_live = num_steps = 0
    waiting = iter(lengths)
    following = next(waiting, None)
    while following is not None:
        need = reserve(*following, context)
        if len(live) < num_rows and reserved + need <= slots:
            prompt, output = following
            heapq.heappush(live, (now + output, need, prompt + output))
            reserved += need
            used += prompt
            following = next(waiting, None)
            continue
        end, freed, length = heapq.heappop(live)
        steps, count = end - now, len(live) + 1
        sum_used += steps * used + count * steps * (steps - 1) // 2
        sum_reserved += steps * reserved
        sum_live += steps * count
        num_steps += steps
        used += count * steps - length
        reserved -= freed
        now = end
    if not sum_reserved:
        return 0.0, 0.0
    return 1 - sum_used / sum_reserved, sum_live / num_steps
