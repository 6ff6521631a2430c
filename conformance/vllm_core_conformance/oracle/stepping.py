"""What a step does to the rows, one number at a time, in Python integers.

Written from the page of the seam (section 4): resets, then table cells, then history; the step's
own tokens join the history; then every row moves on.

Knows: rows, positions, slots. Does not know: arrays of a device, attention, sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Column

Numbers = NDArray[Any]


@dataclass
class Rows:
    """The state on the host. Row N, history slot P are scrap and never compared."""

    tables: list[Numbers]
    """Per group [N+1, M]."""
    num_tokens: Numbers
    last_token: Numbers
    params: Numbers
    history: Numbers

    @property
    def scrap(self) -> int:
        return len(self.num_tokens) - 1

    @property
    def scrap_slot(self) -> int:
        return len(self.history) - 1


@dataclass
class View:
    """What must follow from a step; lists hold one entry per real token or row."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)


def apply(rows: Rows, table_changes: Sequence[Numbers], history_changes: Numbers) -> None:
    for table, changes in zip(rows.tables, table_changes, strict=True):
        for row, column, block in changes.tolist():
            if row < rows.scrap:
                table[row, column] = block
    for slot, position, token in history_changes.tolist():
        if slot < rows.scrap_slot:
            rows.history[slot, position] = token


def expand(
    rows: Rows, step: Mapping[str, Numbers], block_tokens: Sequence[int], vocab_size: int
) -> View:
    """step: the named fields of a packed step (`StepLayout.views`). Changes `rows`."""
    for row, computed, *params in step["resets"].tolist():
        if row < rows.scrap:
            rows.num_tokens[row] = computed
            rows.params[row] = params
    tables = [step[f"table_changes{group}"] for group in range(len(block_tokens))]
    apply(rows, tables, step["history_changes"])

    view = View(slots=[[] for _ in block_tokens])
    start = step["query_start"].tolist()
    for s, row in enumerate(step["row"].tolist()):
        if row >= rows.scrap:
            continue
        before = int(rows.num_tokens[row])
        for t in range(start[s], start[s + 1]):
            token = int(step["token_ids"][t])
            token = int(rows.last_token[row]) if token == -1 else token
            token = min(max(token, 0), vocab_size - 1)
            position = before + t - start[s]
            view.token_ids.append(token)
            view.positions.append(position)
            view.sequence.append(s)
            view.row.append(row)
            for group, size in enumerate(block_tokens):
                block = int(rows.tables[group][row, position // size])
                view.slots[group].append(block * size + position % size)
            slot = int(rows.params[row, Column.HISTORY_SLOT])
            if slot < rows.scrap_slot:
                rows.history[slot, position] = token
        view.seq_lens.append(before + start[s + 1] - start[s])
    return view


def advance(rows: Rows, step: Mapping[str, Numbers], view: View, tokens: Numbers) -> None:
    """tokens [S, 1], -1 where nothing was drawn."""
    live = [row for row in step["row"].tolist() if row < rows.scrap]
    for s, (row, length) in enumerate(zip(live, view.seq_lens, strict=True)):
        rows.num_tokens[row] = length
        if tokens[s, 0] >= 0:
            rows.last_token[row] = tokens[s, 0]


def empty(num_rows: int, widths: Sequence[int], num_slots: int, length: int, columns: int) -> Rows:
    return Rows(
        [np.zeros((num_rows + 1, width), np.int64) for width in widths],
        np.zeros(num_rows + 1, np.int64),
        np.zeros(num_rows + 1, np.int64),
        np.zeros((num_rows + 1, columns), np.int64),
        np.zeros((num_slots + 1, length), np.int64),
    )
