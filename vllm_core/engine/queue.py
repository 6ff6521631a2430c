"""Sequences that wait for a row, in the order in which they may have one.

Knows: rank. Does not know: blocks, rows.
"""

from __future__ import annotations

import heapq

from vllm_core.engine.request import Sequence

PRIORITY_SHIFT = 40
"""Arrivals fit 40 bits, so that one integer orders by priority, then by arrival."""


def rank_of(sequence: Sequence, policy: str) -> int:
    """Lower runs earlier: by arrival, or by priority and then arrival; siblings in their order."""
    request = sequence.request
    rank = request.arrival
    if policy == "priority":
        rank += request.priority << PRIORITY_SHIFT
    return rank


class WaitingQueue:
    """A heap; sequences that ended while they waited are dropped when they come up."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._heap: list[tuple[int, int, Sequence]] = []

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (rank_of(sequence, self.policy), sequence.index, sequence))

    def peek(self) -> Sequence | None:
        """The next sequence; it stays."""
        while self._heap and self._heap[0][2].is_finished:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """The one that `peek` showed."""
        return heapq.heappop(self._heap)[2]

    def __len__(self) -> int:
        return sum(1 for _, _, s in self._heap if not s.is_finished)

    def __bool__(self) -> bool:
        return self.peek() is not None
