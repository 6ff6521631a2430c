"""What a step does to the device state: one text for every framework.

Knows: how positions, slots and ids follow from changes. Does not know: models, attention, sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_core.ops.arrays import Array
from vllm_core.ops.block_table import BlockTables
from vllm_core.ops.step import Changes, Column, DeviceState, StepInput, StepView

if TYPE_CHECKING:
    from vllm_core.ops.interface import Ops


def apply(ops: Ops, block_tables: BlockTables, state: DeviceState, changes: Changes) -> DeviceState:
    """Writes table cells and history tokens; the fixed-shape program for what overflows a step's
    buffer."""
    tables = block_tables.apply(state.tables, changes.table_changes)
    h = changes.history_changes
    history = ops.put(state.history, (h[:, 0], h[:, 1]), h[:, 2])
    return state._replace(tables=tables, history=history)


def expand(
    ops: Ops,
    block_tables: BlockTables,
    state: DeviceState,
    step: StepInput,
    block_tokens: tuple[int, ...],
    vocab_size: int,
) -> tuple[StepView, DeviceState]:
    """Positions, slots and ids of the step's T tokens, from changes.

    Resets come first, then table cells, then history: the only order in which a row may be reused
    in one step. The tokens of the step are written into the history, so that a draw sees everything
    before it.
    """
    xp = ops.xp
    reset = step.resets[:, 0]
    state = state._replace(
        num_tokens=ops.put(state.num_tokens, (reset,), step.resets[:, 1]),
        params=ops.put(state.params, (reset,), step.resets[:, 2:]),
    )
    state = apply(ops, block_tables, state, Changes(step.table_changes, step.history_changes))

    scrap = state.num_tokens.shape[0] - 1
    num_rows = step.row.shape[0]
    t = ops.arange(step.token_ids.shape[0])
    valid = t < step.query_start[num_rows]
    sequence = xp.searchsorted(step.query_start, t, side="right") - 1
    sequence = ops.cast(xp.clip(sequence, 0, num_rows - 1), "int32")
    row = xp.where(valid, step.row[sequence], scrap)
    positions = state.num_tokens[row] + t - step.query_start[sequence]
    positions = xp.where(valid, positions, 0)
    ids = xp.where(step.token_ids == -1, state.last_token[row], step.token_ids)
    ids = xp.clip(ids, 0, vocab_size - 1)
    slots = []
    for group, size in enumerate(block_tokens):
        block = block_tables.lookup(state.tables, group, row, positions // size)
        slots.append(xp.where(valid, block * size + positions % size, 0))
    lengths = step.query_start[1:] - step.query_start[:-1]
    seq_lens = xp.where(step.row < scrap, state.num_tokens[step.row] + lengths, 0)

    slot = state.params[row, int(Column.HISTORY_SLOT)]
    slot = xp.where(valid, slot, state.history.shape[0] - 1)
    place = xp.clip(positions, 0, state.history.shape[1] - 1)
    state = state._replace(history=ops.put(state.history, (slot, place), ids))
    return StepView(ids, positions, tuple(slots), sequence, row, valid, seq_lens), state


def advance(
    ops: Ops, state: DeviceState, step: StepInput, view: StepView, tokens: Array
) -> tuple[Array, DeviceState]:
    """Moves every row on, also those that drew nothing. tokens [S, 1], -1 where nothing was drawn.

    -> num_accepted [S] (0: there are no drafts yet), state. Apart from `finish`, because whoever
    holds a
    DeviceState runs it: other pipeline stages, a draft model, a backend whose tokens the host
    draws.
    """
    xp = ops.xp
    drawn = tokens[:, 0]
    last = xp.where(drawn >= 0, drawn, state.last_token[step.row])
    state = state._replace(
        num_tokens=ops.put(state.num_tokens, (step.row,), view.seq_lens),
        last_token=ops.put(state.last_token, (step.row,), last),
    )
    return xp.zeros_like(view.seq_lens), state
