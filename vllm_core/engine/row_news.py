"""What the device must be told of newly admitted rows, and the slots that these rows own.

History slots are for rows whose penalties need every token, bias slots for rows with a value per
token of the vocabulary; both are fewer than rows, so a sequence may have to wait for one.

Knows: slots, parameters on their way. Does not know: blocks, order, devices.
"""

from __future__ import annotations

import numpy as np

from vllm_core.engine.limits import Limits
from vllm_core.engine.request import Sequence
from vllm_core.engine.rows import Rows
from vllm_core.ops import NUM_COLUMNS, HostArray


class RowNews:
    """Collected while a step is planned, taken by its plan."""

    def __init__(self, limits: Limits, rows: Rows) -> None:
        self._rows = rows
        self._num_history, self._num_bias = limits.num_history_slots, limits.num_bias_slots
        self.free_history = list(range(self._num_history - 1, -1, -1))
        self.free_bias = list(range(self._num_bias - 1, -1, -1))
        self._resets: dict[int, HostArray] = {}
        self._history: list[tuple[int, int, int]] = []
        self._bias: dict[int, tuple[int, HostArray]] = {}

    def has_slots(self, sequence: Sequence) -> bool:
        """Whether the slots that the sequence needs are free."""
        params = sequence.request.params
        has_history = not params.needs_history or bool(self.free_history)
        return has_history and (not params.needs_bias or bool(self.free_bias))

    def admit(self, sequence: Sequence, row: int, tokens: HostArray, hit: int) -> None:
        """The row's parameters, its slots, and the tokens that a prefix hit skipped."""
        r, request = self._rows, sequence.request
        history, bias = self._num_history, self._num_bias
        if request.params.needs_history:
            history = self.free_history.pop()
            self._history += [(history, i, int(tokens[i])) for i in range(hit)]
        if request.bias is not None:
            bias = self.free_bias.pop()
            self._bias[row] = (bias, request.bias)
        r.history_slot[row], r.bias_slot[row] = history, bias
        own = sequence.param_row(history, bias)
        self._resets[row] = np.concatenate((np.array([row, hit], np.int32), own))

    def release(self, row: int) -> None:
        """The row has no owner any more: what was not taken yet is void."""
        self._resets.pop(row, None)
        self._bias.pop(row, None)
        history, bias = int(self._rows.history_slot[row]), int(self._rows.bias_slot[row])
        if history < self._num_history:
            self._history = [c for c in self._history if c[0] != history]
            self.free_history.append(history)
        if bias < self._num_bias:
            self.free_bias.append(bias)

    def take_resets(self, rows: HostArray) -> HostArray:
        """[r, 2 + columns] of rows in the step; one admitted without room for a chunk waits with
        its own."""
        taken: list[HostArray] = []
        if self._resets:
            taken = [self._resets.pop(row) for row in rows.tolist() if row in self._resets]
        return np.array(taken, np.int32).reshape(-1, 2 + NUM_COLUMNS)

    def take_history(self) -> HostArray:
        """[c, 3] int32 (history slot, position, token)."""
        taken, self._history = np.array(self._history, np.int32).reshape(-1, 3), []
        return taken

    def take_bias(self) -> tuple[tuple[int, HostArray], ...]:
        """(bias slot, values [V])."""
        taken, self._bias = tuple(self._bias.values()), {}
        return taken
