"""Sequences that wait for a row, in the order in which they may have one.

Knows: rank. Does not know: blocks, rows.
"""

from __future__ import annotations

import heapq

from vllm_core.engine.request import Request, Sequence

PRIORITY_SHIFT = 40
"""Arrivals fit 40 bits, so that one integer orders by priority, then by arrival."""


def rank_of(sequence: Sequence, policy: str) -> int:
    """Lower runs earlier, no two are equal: by arrival, or by priority and then arrival; siblings
    in their order."""
    request = sequence.request
    rank = request.arrival + sequence.index
    if policy == "priority":
        rank += request.priority << PRIORITY_SHIFT
    return rank


class WaitingQueue:
    """A heap. When they come up, sequences that ended while they waited are dropped, paused ones
    put aside."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._heap: list[tuple[int, Sequence]] = []
        self._aside: list[Sequence] = []

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (rank_of(sequence, self.policy), sequence))

    def resume(self, request: Request) -> None:
        """The request is paused no longer, or has ended: its sequences wait again where they
        stood."""
        for sequence in [s for s in self._aside if s.request is request]:
            self._aside.remove(sequence)
            if not sequence.is_finished:
                self.push(sequence)

    def peek(self) -> Sequence | None:
        """The next sequence; it stays."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence.is_finished:
                heapq.heappop(self._heap)
            elif sequence.request.is_paused:
                self._aside.append(heapq.heappop(self._heap)[1])
            else:
                return sequence
        return None

    def pop(self) -> Sequence:
        """The one that `peek` shows."""
        self.peek()
        return heapq.heappop(self._heap)[1]

    def waiting(self) -> list[Sequence]:
        """All that wait, in no order, paused ones included."""
        return [s for s in (*self._aside, *(s for _, s in self._heap)) if not s.is_finished]

    def __len__(self) -> int:
        return len(self.waiting())

    def __bool__(self) -> bool:
        return self.peek() is not None
