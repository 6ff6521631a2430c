"""What a step does to the rows, against a plain-Python model, in every framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import StepLayout
from vllm_core.backend.step import scrap_params
from vllm_core.ops import (
    NUM_COLUMNS,
    BucketKey,
    Changes,
    Column,
    DeviceState,
    HostArray,
)
from vllm_core.tests.ops.frameworks import BINDINGS, compiled, open_binding

NUM_ROWS, NUM_SLOTS, LENGTH, VOCAB = 6, 3, 40, 50
BLOCK_TOKENS = (4, 8)
WIDTHS = (12, 6)
KEY = BucketKey(tokens=32, rows=5, widths=WIDTHS)
LAYOUT = StepLayout(KEY, NUM_ROWS, NUM_SLOTS, 2, BLOCK_TOKENS)


@dataclass
class Expected:
    """The view that must follow from a step."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=lambda: [[], []])
    sequence: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)


@dataclass
class Model:
    """Rows as Python dictionaries; builds random steps and says what they must do."""

    rng: np.random.Generator
    num_tokens: dict[int, int] = field(default_factory=dict)
    last_token: dict[int, int] = field(default_factory=dict)
    slot: dict[int, int] = field(default_factory=dict)
    tables: list[dict[tuple[int, int], int]] = field(default_factory=lambda: [{}, {}])
    history: dict[tuple[int, int], int] = field(default_factory=dict)

    def admit(self, row: int, resets: list[list[int]], told: list[tuple[int, ...]]) -> None:
        """Reset with a hit of some blocks and perhaps a history slot, whose first tokens the host
        tells."""
        hit = int(self.rng.integers(0, 3)) * 8
        slot = int(self.rng.integers(0, NUM_SLOTS + 1))
        others = [s for r, s in self.slot.items() if r != row]
        slot = NUM_SLOTS if slot in others else slot
        self.num_tokens[row], self.slot[row] = hit, slot
        params = scrap_params(slot, 2)
        params[Column.SEED_LOW] = self.rng.integers(-(2**31), 2**31)
        resets.append([row, hit, *params])
        for position in range(min(hit, 2) if slot < NUM_SLOTS else 0):
            told.append((slot, position, int(self.rng.integers(VOCAB))))

    def step(self) -> tuple[HostArray, Changes, HostArray, Expected]:
        """(packed step, changes that go ahead of it, tokens it draws, what must follow)."""
        rng, want, at = self.rng, Expected(), 0
        buffer = LAYOUT.template().copy()
        views = LAYOUT.views(buffer)
        cells: list[list[tuple[int, int, int]]] = [[], []]
        resets: list[list[int]] = []
        told: list[tuple[int, ...]] = []
        written: list[tuple[int, ...]] = []
        drawn = np.full((KEY.rows, 1), -1, np.int32)
        rows = rng.permutation(NUM_ROWS)[: rng.integers(0, KEY.rows + 1)]
        for s, row in enumerate(map(int, rows)):
            fresh = row not in self.num_tokens or rng.random() < 0.3
            fresh = fresh or self.num_tokens[row] == LENGTH
            if fresh:
                self.admit(row, resets, told)
            start = self.num_tokens[row]
            room = min(LENGTH - start, KEY.tokens - at - (len(rows) - s - 1), 9)
            length = int(rng.integers(1, room + 1)) if fresh or rng.random() < 0.4 else 1
            self.grow(row, start + length, cells)
            ids = rng.integers(0, VOCAB, length)
            if not fresh and row in self.last_token:
                ids[0] = -1
            views["token_ids"][at : at + length] = ids
            views["row"][s], views["query_start"][s + 1 :] = row, at + length
            self.expect(want, s, row, ids.tolist(), written)
            at += length
            if rng.random() < 0.7:
                drawn[s] = self.last_token[row] = int(rng.integers(VOCAB))
        if resets:
            views["resets"][: len(resets)] = resets
        ahead = self.spill(views, cells, told)
        for slot, position, token in told + written:
            self.history[slot, position] = token
        return buffer, ahead, drawn, want

    def grow(self, row: int, length: int, cells: list[list[tuple[int, int, int]]]) -> None:
        """Blocks for the tokens up to `length`, in each group's own size."""
        for group, size in enumerate(BLOCK_TOKENS):
            for column in range(-(-length // size)):
                if (row, column) not in self.tables[group] or self.rng.random() < 0.1:
                    block = int(self.rng.integers(1, 1000))
                    self.tables[group][row, column] = block
                    cells[group].append((row, column, block))

    def expect(
        self, want: Expected, s: int, row: int, ids: list[int], written: list[tuple[int, ...]]
    ) -> None:
        start = self.num_tokens[row]
        for position, token in enumerate(ids, start):
            token = self.last_token[row] if token == -1 else token
            want.ids.append(token)
            want.positions.append(position)
            want.sequence.append(s)
            want.row.append(row)
            for group, size in enumerate(BLOCK_TOKENS):
                block = self.tables[group][row, position // size]
                want.slots[group].append(block * size + position % size)
            if self.slot[row] < NUM_SLOTS:
                written.append((self.slot[row], position, token))
        self.num_tokens[row] = start + len(ids)
        want.seq_lens.append(start + len(ids))

    def spill(
        self,
        views: dict[str, HostArray],
        cells: list[list[tuple[int, int, int]]],
        told: list[tuple[int, ...]],
    ) -> Changes:
        """Fills the change lists of the step and returns what does not fit, padded to a fixed
        shape."""

        def rest(name: str, rows: list[Any], scrap: int) -> HostArray:
            fits = LAYOUT.num_changes
            views[name][: len(rows[:fits])] = np.array(rows[:fits]).reshape(-1, 3)
            rows = rows[fits:] + [(scrap, 0, 0)] * (64 - len(rows[fits:]))
            return np.array(rows, np.int32)

        groups = (rest(f"table_changes{g}", c, NUM_ROWS) for g, c in enumerate(cells))
        return Changes(tuple(groups), rest("history_changes", told, NUM_SLOTS))


def empty_state(binding: str) -> DeviceState:
    runtime = open_binding(binding)
    ops = runtime.ops

    def zeros(*shape: int) -> Any:
        return ops.full(shape, 0, "int32")

    params = np.tile(scrap_params(NUM_SLOTS, 2), (NUM_ROWS + 1, 1))
    return DeviceState(
        runtime.block_tables.alloc(NUM_ROWS, WIDTHS),
        zeros(NUM_ROWS + 1),
        zeros(NUM_ROWS + 1),
        ops.asarray(params),
        zeros(NUM_SLOTS + 1, LENGTH),
        ops.full((3, VOCAB), 0.0, "float32"),
    )


@lru_cache
def stepper(binding: str) -> Callable[..., Any]:
    runtime = open_binding(binding)
    ops, tables = runtime.ops, runtime.block_tables

    def run(state: DeviceState, ahead: Changes, buffer: Any, tokens: Any) -> tuple[Any, ...]:
        state = ops.apply(tables, state, ahead)
        step = LAYOUT.unpack(buffer)
        view, state = ops.expand(tables, state, step, BLOCK_TOKENS, VOCAB)
        accepted, state = ops.advance(state, step, view, tokens)
        return view, state, accepted

    return compiled(runtime, run)


NOTHING = Changes(
    (np.full((64, 3), [NUM_ROWS, 0, 0], np.int32),) * 2,
    np.full((64, 3), [NUM_SLOTS, 0, 0], np.int32),
)


def run(
    binding: str,
    state: DeviceState,
    buffer: HostArray,
    drawn: HostArray | None = None,
    ahead: Changes = NOTHING,
) -> tuple[Any, DeviceState, HostArray]:
    """One step of host arrays, or of the state that the step before gave back."""
    asarray = open_binding(binding).ops.asarray
    drawn = np.full((KEY.rows, 1), -1, np.int32) if drawn is None else drawn
    state = DeviceState(
        tuple(asarray(np.asarray(t)) for t in state.tables),
        *(asarray(np.asarray(x)) for x in state[1:]),
    )
    ahead = Changes(tuple(map(asarray, ahead.table_changes)), asarray(ahead.history_changes))
    found = stepper(binding)(state, ahead, asarray(buffer), asarray(drawn))
    return found[0], found[1], found[2]


def check(want: Expected, view: Any) -> None:
    used = len(want.ids)
    padding = KEY.tokens - used
    assert np.asarray(view.valid).tolist() == [True] * used + [False] * padding
    assert np.asarray(view.token_ids)[:used].tolist() == want.ids
    assert np.asarray(view.positions).tolist() == want.positions + [0] * padding
    assert np.asarray(view.row).tolist() == want.row + [NUM_ROWS] * padding
    assert np.asarray(view.sequence)[:used].tolist() == want.sequence
    for found, slots in zip(view.slots, want.slots):
        assert np.asarray(found).tolist() == slots + [0] * padding
    rows = len(want.seq_lens)
    assert np.asarray(view.seq_lens).tolist() == want.seq_lens + [0] * (KEY.rows - rows)


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_random_steps_follow_the_plain_model(binding: str, seed: int) -> None:
    model, state = Model(np.random.default_rng(seed)), empty_state(binding)
    for _ in range(25):
        buffer, ahead, drawn, want = model.step()
        view, state, accepted = run(binding, state, buffer, drawn, ahead)
        check(want, view)
        assert not np.asarray(accepted).any()
        num_tokens, last = np.asarray(state.num_tokens), np.asarray(state.last_token)
        assert {r: int(num_tokens[r]) for r in model.num_tokens} == model.num_tokens
        assert {r: int(last[r]) for r in model.last_token} == model.last_token
        for group, cells in enumerate(model.tables):
            table = np.asarray(state.tables[group])
            assert {cell: int(table[cell]) for cell in cells} == cells
        history = np.asarray(state.history)
        assert {cell: int(history[cell]) for cell in model.history} == model.history


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_step_of_padding_changes_nothing_but_scrap(binding: str) -> None:
    rng = np.random.default_rng(9)
    start = empty_state("numpy")

    def some(x: HostArray) -> HostArray:
        return np.asarray(rng.integers(1, 9, x.shape), np.int32)

    start = DeviceState(
        tuple(map(some, start.tables)),
        some(start.num_tokens),
        some(start.last_token),
        some(start.params),
        some(start.history),
        start.bias,
    )
    view, after, _ = run(binding, start, LAYOUT.template().copy())
    check(Expected(), view)
    for old, new in zip((*start.tables, *start[1:]), (*after.tables, *after[1:])):
        assert (np.asarray(new)[:-1] == old[:-1]).all()


@pytest.mark.parametrize("binding", BINDINGS)
def test_apply_writes_cells_and_history_and_padding_hits_scrap(binding: str) -> None:
    runtime = open_binding(binding)
    ops = runtime.ops
    apply = compiled(
        runtime, lambda state, changes: (ops.apply(runtime.block_tables, state, changes),)
    )
    cells = np.array([[2, 3, 77], [NUM_ROWS, 0, 0], [0, 5, 12], [NUM_ROWS, 0, 0]], np.int32)
    told = np.array([[1, 39, 5], [NUM_SLOTS, 0, 0], [0, 0, 6]], np.int32)
    changes = Changes((ops.asarray(cells), ops.asarray(cells[:1])), ops.asarray(told))
    (state,) = apply(empty_state(binding), changes)
    assert np.argwhere(np.asarray(state.tables[0])).tolist() == [[0, 5], [2, 3]]
    assert np.asarray(state.tables[1])[2, 3] == 77
    assert np.argwhere(np.asarray(state.history)).tolist() == [[0, 0], [1, 39]]


@pytest.mark.parametrize("binding", BINDINGS)
def test_token_0_is_a_token_and_minus_1_is_none(binding: str) -> None:
    buffer = LAYOUT.template().copy()
    views = LAYOUT.views(buffer)
    views["row"][:2], views["query_start"][1:] = (1, 2), 2
    views["query_start"][1] = 1
    drawn = np.full((KEY.rows, 1), -1, np.int32)
    drawn[:2, 0] = 7
    _, state, _ = run(binding, empty_state(binding), buffer, drawn)
    drawn[:2, 0] = 0, -1
    _, state, _ = run(binding, state, buffer, drawn)
    assert np.asarray(state.last_token)[1:3].tolist() == [0, 7]


@pytest.mark.parametrize("binding", BINDINGS)
def test_ids_beyond_the_vocabulary_are_clipped(binding: str) -> None:
    buffer = LAYOUT.template().copy()
    views = LAYOUT.views(buffer)
    views["row"][0], views["query_start"][1:] = 1, 3
    views["token_ids"][:3] = VOCAB, 2**31 - 1, -7
    view, _, _ = run(binding, empty_state(binding), buffer)
    assert np.asarray(view.token_ids)[:3].tolist() == [VOCAB - 1, VOCAB - 1, 0]


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (7, 3), (32, 5)])
def test_a_packed_step_comes_back_from_its_buffer(binding: str, tokens: int, rows: int) -> None:
    layout = StepLayout(BucketKey(tokens, rows, WIDTHS), NUM_ROWS, NUM_SLOTS, 2, BLOCK_TOKENS)
    buffer = layout.template().copy()
    for number, view in enumerate(layout.views(buffer).values()):
        view[...] = np.arange(view.size).reshape(view.shape) + 1000 * number
    assert len(np.unique(buffer)) == len(buffer)  # views cover the buffer and do not overlap
    step = layout.unpack(open_binding(binding).ops.asarray(buffer))
    found = {**step._asdict()}
    for group, table in enumerate(found.pop("table_changes")):
        found[f"table_changes{group}"] = table
    for name, view in layout.views(buffer).items():
        assert (np.asarray(found[name]) == view).all(), name
        assert tuple(found[name].shape) == view.shape


def test_a_template_holds_padding_that_means_nothing() -> None:
    views = LAYOUT.views(LAYOUT.template())
    assert (views["row"] == NUM_ROWS).all()
    assert (views["logit_rows"] == [0, KEY.rows]).all()
    assert (views["resets"][:, 0] == NUM_ROWS).all()
    assert views["resets"].shape[1] == 2 + NUM_COLUMNS
    assert (views["table_changes1"] == [NUM_ROWS, 0, 0]).all()
    assert (views["history_changes"] == [NUM_SLOTS, 0, 0]).all()
    assert not views["query_start"].any()
    assert not LAYOUT.template().flags.writeable
