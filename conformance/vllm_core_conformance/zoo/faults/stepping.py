"""Wrong steps of the device state: expand, advance, apply, block tables.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Changes, DeviceState, StepInput, StepView
from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import Method, Numbers, Open, ops, tables


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "stepping", says, open_wrong, worst)


# ---------------------------------------------------------------- the view
def _seen(change: Method) -> Open:
    """expand with another view: change(view, state, step, block_tokens) -> fields."""

    def wrong(base: Method, tables: Any, state: Any, step: Any, sizes: Any, vocab: int) -> Any:
        view, state = base(tables, state, step, sizes, vocab)
        return view._replace(**change(view, state, step, sizes)), state

    return ops(expand=wrong)


def _given(change: Method) -> Open:
    """expand of another step: change(step, state) -> fields."""

    def wrong(base: Method, tables: Any, state: Any, step: Any, sizes: Any, vocab: int) -> Any:
        return base(tables, state, step._replace(**change(step, state)), sizes, vocab)

    return ops(expand=wrong)


def _padding_positions(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    tokens = np.arange(len(view.valid), dtype=np.int32)
    return {"positions": np.where(view.valid, view.positions, tokens)}


def _padding_slots(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    last = int(view.valid.sum()) - 1
    return {"slots": tuple(np.where(view.valid, s, s[last] + 1) for s in view.slots)}


def _padding_row(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"row": np.where(view.valid, view.row, 0)}


def _padding_length(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"seq_lens": np.where(step.row < len(state.num_tokens) - 1, view.seq_lens, 1)}


def _padding_valid(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    """Whole tiles of eight tokens are valid."""
    count = -(-int(view.valid.sum()) // 8) * 8
    return {"valid": np.arange(len(view.valid)) < count}


def _no_new_tokens(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    lengths = step.query_start[1:] - step.query_start[:-1]
    return {"seq_lens": np.where(lengths > 1, view.seq_lens - lengths, view.seq_lens)}


def _first_size(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    """Every group uses the block size of group 0."""
    slots = [view.slots[0]]
    for group, table in enumerate(state.tables[1:], 1):
        del group
        column = np.clip(view.positions // sizes[0], 0, table.shape[1] - 1)
        slot = table[view.row, column] * sizes[0] + view.positions % sizes[0]
        slots.append(np.where(view.valid, slot, 0))
    return {"slots": tuple(slots)}


def _float_slots(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"slots": tuple(s.astype(np.float32).astype(np.int32) for s in view.slots)}


def _short_slots(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"slots": tuple(s.astype(np.uint16).astype(np.int32) for s in view.slots)}


def _short_positions(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"positions": view.positions.astype(np.int16).astype(np.int32)}


def _boundary_slot(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    """The last slot of a block is taken for the first of the next."""
    slots = tuple(
        np.where(view.valid & (view.positions % n == n - 1), s - n + 1, s)
        for s, n in zip(view.slots, sizes)
    )
    return {"slots": slots}


def _far_ids(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    ids = np.where(step.token_ids == -1, state.last_token[view.row], step.token_ids)
    return {"token_ids": ids}


def _unreplaced(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"token_ids": np.where(step.token_ids == -1, 0, view.token_ids)}


def _last_of_step_row(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    """last_token is read at the row of the step, not at the row for life."""
    last = state.last_token[np.minimum(view.sequence, len(state.last_token) - 1)]
    return {"token_ids": np.where(step.token_ids == -1, last, view.token_ids).astype(np.int32)}


def _left_sequence(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    """A row's first token belongs to the row before."""
    tokens = np.arange(len(view.valid))
    owner = np.searchsorted(step.query_start, tokens, side="left") - 1
    return {"sequence": np.clip(owner, 0, len(step.row) - 1).astype(np.int32)}


def _thirty_two_rows(view: StepView, state: DeviceState, step: StepInput, sizes: Any) -> Any:
    return {"sequence": np.minimum(view.sequence, 31)}


# ---------------------------------------------------------------- the state
def _zero_not_reset(step: StepInput, state: DeviceState) -> Any:
    """A reset to 0 tokens leaves the old count."""
    resets = np.array(step.resets)
    old = state.num_tokens[np.minimum(resets[:, 0], len(state.num_tokens) - 1)]
    resets[:, 1] = np.where(resets[:, 1] == 0, old, resets[:, 1])
    return {"resets": resets}


def _first_reset(step: StepInput, state: DeviceState) -> Any:
    resets = np.array(step.resets)
    resets[4:, 0] = len(state.num_tokens) - 1
    return {"resets": resets}


def _short_params(step: StepInput, state: DeviceState) -> Any:
    """The last columns of the parameters are not copied."""
    resets = np.array(step.resets)
    at = 2 + int(Column.HELD_IDS) + 8
    resets[:, at:] = state.params[np.minimum(resets[:, 0], len(state.params) - 1), at - 2 :]
    return {"resets": resets}


def _params_as_floats(step: StepInput, state: DeviceState) -> Any:
    """Parameters pass through float32: seeds and slots above 2^24 lose bits."""
    resets = np.array(step.resets)
    words = resets[:, 2 + int(Column.SEED_LOW) : 2 + int(Column.SEQUENCE_INDEX)]
    words[:] = np.clip(words.astype(np.float32), -(2.0**31), 2147483520).astype(np.int32)
    return {"resets": resets}


def _far_columns(step: StepInput, state: DeviceState) -> Any:
    changes = tuple(np.array(c) for c in step.table_changes)
    for c in changes:
        c[c[:, 1] >= 8, 0] = len(state.num_tokens) - 1
    return {"table_changes": changes}


def _few_changes(count: int) -> Method:
    def wrong(step: StepInput, state: DeviceState) -> Any:
        changes = tuple(np.array(c) for c in step.table_changes)
        for c in changes:
            c[count:, 0] = len(state.num_tokens) - 1
        return {"table_changes": changes}

    return wrong


def _groups_alike(step: StepInput, state: DeviceState) -> Any:
    return {"table_changes": (step.table_changes[0],) * len(step.table_changes)}


def _history_lost(step: StepInput, state: DeviceState) -> Any:
    changes = np.array(step.history_changes)
    changes[:, 0] = len(state.history) - 1
    return {"history_changes": changes}


def _few_history(step: StepInput, state: DeviceState) -> Any:
    changes = np.array(step.history_changes)
    changes[16:, 0] = len(state.history) - 1
    return {"history_changes": changes}


def _history(change: Method) -> Open:
    """expand with another history: change(old, new, view, step, state) -> history."""

    def wrong(base: Method, tables: Any, state: Any, step: Any, sizes: Any, vocab: int) -> Any:
        old = np.array(state.history)
        view, state = base(tables, state, step, sizes, vocab)
        return view, state._replace(history=change(old, state.history, view, step, state))

    return ops(expand=wrong)


def _changes_of(history: Numbers, step: StepInput) -> Numbers:
    c = step.history_changes
    history[c[:, 0], c[:, 1]] = c[:, 2]
    return history


def _history_with_unknown(
    old: Numbers, new: Numbers, view: StepView, step: StepInput, state: DeviceState
) -> Numbers:
    """Tokens that only the device knows enter the history as -1, clipped to 0."""
    slot = np.where(view.valid, state.params[view.row, int(Column.HISTORY_SLOT)], len(new) - 1)
    unknown = step.token_ids == -1
    new[slot[unknown], np.clip(view.positions[unknown], 0, new.shape[1] - 1)] = 0
    return new


def _history_of_last_token(
    old: Numbers, new: Numbers, view: StepView, step: StepInput, state: DeviceState
) -> Numbers:
    """Of a chunk only the last token enters the history."""
    kept = _changes_of(old, step)
    ends = step.query_start[1:] - 1
    live = step.row < len(state.num_tokens) - 1
    token = ends[live]
    slot = state.params[step.row[live], int(Column.HISTORY_SLOT)]
    kept[slot, np.clip(view.positions[token], 0, new.shape[1] - 1)] = view.token_ids[token]
    return kept


def _changes_last(
    old: Numbers, new: Numbers, view: StepView, step: StepInput, state: DeviceState
) -> Numbers:
    return _changes_of(new, step)


def _own_tokens_lost(
    old: Numbers, new: Numbers, view: StepView, step: StepInput, state: DeviceState
) -> Numbers:
    return _changes_of(old, step)


# ---------------------------------------------------------------- advance
def _advanced(change: Method) -> Open:
    """advance with other fields of the state: change(old, new, step, view, tokens) -> fields."""

    def wrong(base: Method, state: Any, step: Any, view: Any, tokens: Any) -> Any:
        old = state._replace(
            num_tokens=np.array(state.num_tokens), last_token=np.array(state.last_token)
        )
        accepted, state = base(state, step, view, tokens)
        return accepted, state._replace(**change(old, state, step, view, tokens))

    return ops(advance=wrong)


def _only_drawn(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    num = np.array(new.num_tokens)
    idle = step.row[tokens[:, 0] < 0]
    num[idle] = old.num_tokens[idle]
    return {"num_tokens": num}


def _twice(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    num = np.array(new.num_tokens)
    one = (step.query_start[1:] - step.query_start[:-1] == 1) & (tokens[:, 0] >= 0)
    num[step.row[one]] += 1
    return {"num_tokens": num}


def _scrap_to_zero(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    """Padding rows are wrapped into the state: row N is row 0."""
    num = np.array(new.num_tokens)
    if (step.row == len(num) - 1).any():
        num[0] = 0
    return {"num_tokens": num}


def _forgets_last(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    """A row that draws nothing loses its last token."""
    last = np.array(new.last_token)
    last[step.row] = tokens[:, 0]
    return {"last_token": last}


def _drawn_packed(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    """Drawn tokens are handed out in order, as if every row had drawn."""
    last = np.array(new.last_token)
    drawn = tokens[:, 0][tokens[:, 0] >= 0]
    last[step.row[: len(drawn)]] = drawn
    return {"last_token": last}


def _by_step_row(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    """Tokens go to the row of the step, not to the row for life."""
    last = np.array(old.last_token)
    live = np.nonzero((tokens[:, 0] >= 0) & (step.row < len(last) - 1))[0]
    last[live] = tokens[live, 0]
    return {"last_token": last}


def _eight_rows(old: Any, new: Any, step: Any, view: Any, tokens: Any) -> Any:
    last = np.array(new.last_token)
    last[step.row[8:]] = old.last_token[step.row[8:]]
    return {"last_token": last}


def _accepted_one(base: Method, *args: Any) -> Any:
    accepted, state = base(*args)
    return accepted + 1, state


# ---------------------------------------------------------------- apply, tables
def _first_chunk(base: Method, block_tables: Any, state: Any, changes: Changes) -> Any:
    cut = tuple(c[:256] for c in changes.table_changes)
    return base(block_tables, state, Changes(cut, changes.history_changes))


def _apply_without_history(base: Method, block_tables: Any, state: Any, changes: Changes) -> Any:
    return base(block_tables, state, Changes(changes.table_changes, changes.history_changes[:0]))


def _wrapped(base: Method, all_tables: Any, group: int, row: Any, column: Any) -> Any:
    return base(all_tables, group, row, column % all_tables[group].shape[1])


def _group_zero(base: Method, all_tables: Any, group: int, row: Any, column: Any) -> Any:
    return base(all_tables, 0, row, column)


def _whole_row(base: Method, all_tables: Any, changes: Any) -> Any:
    """A change at column 0 clears the row behind it."""
    for table, c in zip(all_tables, changes):
        first = c[c[:, 1] == 0, 0]
        table[first[first < len(table) - 1], 1:] = 0
    return base(all_tables, changes)


def _short_blocks(base: Method, all_tables: Any, changes: Any) -> Any:
    """Block ids have 16 bits."""
    return base(all_tables, tuple(np.where([0, 0, 1], c & 0xFFFF, c) for c in changes))


VIEW = (
    _wrong("step_padding_positions", "positions of padding count on", _seen(_padding_positions)),
    _wrong(
        "step_padding_slots",
        "padding writes behind the last token",
        _seen(_padding_slots),
        worst=True,
    ),
    _wrong("step_padding_row", "padding belongs to row 0", _seen(_padding_row)),
    _wrong("step_padding_length", "padding rows are one token long", _seen(_padding_length)),
    _wrong("step_padding_valid", "whole tiles of eight tokens are valid", _seen(_padding_valid)),
    _wrong(
        "step_no_new_tokens", "lengths of chunks leave out the step's tokens", _seen(_no_new_tokens)
    ),
    _wrong("step_first_block_size", "every group uses group 0's block size", _seen(_first_size)),
    _wrong("step_float_slots", "slots are computed in float32", _seen(_float_slots)),
    _wrong("step_short_slots", "slots have 16 bits", _seen(_short_slots)),
    _wrong("step_short_positions", "positions have 16 bits", _seen(_short_positions)),
    _wrong("step_boundary_slot", "a block's last slot becomes its first", _seen(_boundary_slot)),
    _wrong("step_far_ids", "ids are not clipped to the vocabulary", _seen(_far_ids)),
    _wrong("step_unreplaced", "-1 is token 0 instead of the row's last token", _seen(_unreplaced)),
    _wrong(
        "step_last_of_step_row",
        "last_token is read at the row of the step",
        _seen(_last_of_step_row),
    ),
    _wrong(
        "step_left_sequence", "a row's first token belongs to the row before", _seen(_left_sequence)
    ),
    _wrong(
        "step_thirty_two_rows", "tokens from row 32 on belong to row 31", _seen(_thirty_two_rows)
    ),
)

STATE = (
    _wrong(
        "reset_zero_ignored", "a reset to 0 tokens keeps the old count", _given(_zero_not_reset)
    ),
    _wrong("reset_four_rows", "only four rows are reset in a step", _given(_first_reset)),
    _wrong("reset_short_params", "the last held ids are not reset", _given(_short_params)),
    _wrong("reset_params_as_floats", "seeds pass through float32", _given(_params_as_floats)),
    _wrong(
        "table_far_columns", "table cells from column 8 on are not written", _given(_far_columns)
    ),
    _wrong(
        "table_eight_changes", "table changes beyond eight are dropped", _given(_few_changes(8))
    ),
    _wrong(
        "table_sixty_four_changes", "table changes beyond 64 are dropped", _given(_few_changes(64))
    ),
    _wrong("table_groups_alike", "every group gets group 0's changes", _given(_groups_alike)),
    _wrong("table_lookup_wraps", "a column past the table wraps", tables(lookup=_wrapped)),
    _wrong("table_lookup_group_zero", "lookups read group 0", tables(lookup=_group_zero)),
    _wrong("table_row_cleared", "a change at column 0 clears the row", tables(apply=_whole_row)),
    _wrong("table_short_blocks", "block ids have 16 bits", tables(apply=_short_blocks)),
    _wrong("apply_first_half", "apply takes 256 of its 512 changes", ops(apply=_first_chunk)),
    _wrong(
        "apply_without_history", "apply drops history changes", ops(apply=_apply_without_history)
    ),
    _wrong("history_changes_lost", "a step's history changes are dropped", _given(_history_lost)),
    _wrong(
        "history_sixteen_changes", "history changes beyond 16 are dropped", _given(_few_history)
    ),
    _wrong(
        "history_with_unknown",
        "tokens of the device enter the history as 0",
        _history(_history_with_unknown),
    ),
    _wrong(
        "history_of_last_token",
        "of a chunk only the last token enters the history",
        _history(_history_of_last_token),
    ),
    _wrong(
        "history_changes_last",
        "history changes overwrite the step's tokens",
        _history(_changes_last),
    ),
    _wrong(
        "history_own_tokens_lost",
        "the step's tokens do not enter the history",
        _history(_own_tokens_lost),
    ),
)

ADVANCE = (
    _wrong(
        "advance_only_drawn", "a row that draws nothing does not move on", _advanced(_only_drawn)
    ),
    _wrong("advance_twice", "a decoding row moves on by two", _advanced(_twice)),
    _wrong("advance_scrap_to_zero", "padding moves row 0", _advanced(_scrap_to_zero)),
    _wrong(
        "advance_forgets_last",
        "a row that draws nothing loses its last token",
        _advanced(_forgets_last),
    ),
    _wrong(
        "advance_drawn_packed", "drawn tokens are handed out in order", _advanced(_drawn_packed)
    ),
    _wrong("advance_by_step_row", "tokens go to the row of the step", _advanced(_by_step_row)),
    _wrong("advance_eight_rows", "only eight rows get their token", _advanced(_eight_rows)),
    _wrong("advance_accepted_one", "num_accepted is 1 without drafts", ops(advance=_accepted_one)),
)

FAULTS = (*VIEW, *STATE, *ADVANCE)
