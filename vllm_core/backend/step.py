"""Packs a step into one int32 buffer with static offsets per key, and unpacks it on the device.

One upload per step: fifteen small arrays cost several times as much as one.

Knows: offsets and padding values. Does not know: scheduling, frameworks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_core.ops import NUM_COLUMNS, Array, BucketKey, Column, HostArray, StepInput

APPLY_ROWS = 512
"""Fixed number of changes in one call of the program `apply`."""


@dataclass(frozen=True)
class StepLayout:
    """Offsets of each field for one key."""

    key: BucketKey
    num_rows: int  # N
    num_history_slots: int  # P
    num_bias_slots: int  # B
    block_tokens: tuple[int, ...]

    @property
    def num_changes(self) -> int:
        """C: table or history changes that fit; more go ahead through `apply`."""
        return self.key.rows + -(-self.key.tokens // min(self.block_tokens)) + 1

    def fields(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(name, shape, padding value) in order."""
        T, S, C, N = self.key.tokens, self.key.rows, self.num_changes, self.num_rows
        return [
            ("row", (S,), N),
            ("query_start", (S + 1,), 0),
            ("token_ids", (T,), 0),
            ("logit_rows", (S, 2), 0),
            ("split", (3,), 0),
            ("resets", (S, 2 + NUM_COLUMNS), N),
            *((f"table_changes{g}", (C, 3), N) for g in range(len(self.block_tokens))),
            ("history_changes", (C, 3), self.num_history_slots),
        ]

    @cached_property
    def places(self) -> tuple[tuple[str, slice, tuple[int, ...]], ...]:
        """(name, where in the buffer, shape) of each field."""
        found, at = [], 0
        for name, shape, _ in self.fields():
            size = math.prod(shape)
            found.append((name, slice(at, at + size), shape))
            at += size
        return tuple(found)

    def template(self) -> HostArray:
        """A read-only buffer that holds padding only."""
        return self._template

    @cached_property
    def _template(self) -> HostArray:
        parts = [np.full(shape, pad, np.int32).ravel() for _, shape, pad in self.fields()]
        buffer = np.concatenate(parts)
        views = self.views(buffer)
        views["logit_rows"][:, 1] = self.key.rows
        for name, view in views.items():
            if "changes" in name:
                view[:, 1:] = 0
        resets = views["resets"]
        resets[:, 1] = 0
        resets[:, 2:] = scrap_params(self.num_history_slots, self.num_bias_slots)
        buffer.setflags(write=False)
        return buffer

    def views(self, buffer: HostArray) -> dict[str, HostArray]:
        """Named writable views of a host buffer."""
        return {name: buffer[where].reshape(shape) for name, where, shape in self.places}

    def unpack(self, buffer: Array) -> StepInput:
        """The same on the device, in any framework: slices and reshapes."""
        found = {name: buffer[where].reshape(shape) for name, where, shape in self.places}
        tables = tuple(found.pop(f"table_changes{g}") for g in range(len(self.block_tokens)))
        return StepInput(**found, table_changes=tables)


def scrap_params(num_history_slots: int, num_bias_slots: int) -> HostArray:
    """[NUM_COLUMNS] int32: greedy, no filter, no penalty, the slots that nobody owns."""
    params = np.zeros(NUM_COLUMNS, np.int32)
    one, infinity = np.array([1.0, np.inf], np.float32).view(np.int32)
    params[[Column.TOP_P, Column.REPETITION]] = one
    params[Column.MIN_P_GAP] = infinity
    params[Column.HISTORY_SLOT], params[Column.BIAS_SLOT] = num_history_slots, num_bias_slots
    params[Column.HELD_IDS :] = -1
    return params
