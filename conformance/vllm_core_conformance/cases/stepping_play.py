"""Random lives of rows, played on a backend step by step beside the oracle.

Knows: how an engine packs steps and passes the state on. Does not know: what follows (oracle).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import DeviceStep, HostStep, StepLayout
from vllm_core.backend.step import scrap_params
from vllm_core.ops import NUM_COLUMNS, BucketKey, Changes, Column, DeviceState
from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.oracle import stepping as oracle
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling

Numbers = NDArray[Any]

FLOATS = (
    Column.TEMPERATURE,
    Column.TOP_P,
    Column.MIN_P_GAP,
    Column.PRESENCE,
    Column.FREQUENCY,
    Column.REPETITION,
)

Plan: TypeAlias = tuple[int, bool, int, int]
"""Row, whether it is new, its length before the step, its tokens in the step."""

PAST = 3
"""Columns past a table that are looked up."""


@dataclass(frozen=True)
class World:
    """Static sizes: one compiled step per world."""

    num_rows: int = 6
    num_slots: int = 3
    num_bias: int = 2
    length: int = 64
    """L, also the longest sequence."""
    vocab: int = 50
    block_tokens: tuple[int, ...] = (4, 16)
    width: int = 17
    """Columns of every group's table, one more than any sequence needs."""
    tokens: int = 32
    rows: int = 5
    largest_block: int = 2**27 - 1
    """With 16 tokens a block, the last slot is 2^31 - 1."""
    hits: int = 2
    """A prefix hit is at most so many common multiples of the block sizes."""
    far: int = 0
    """Where prefix hits of every `far_every`th row begin."""
    far_every: int = 2
    ahead: int = 48
    """Changes in one call of `apply`."""


class Play:
    """One state on the device and its twin on the host."""

    def __init__(self, target: Target, world: World, rng: np.random.Generator) -> None:
        self.target, self.world, self.rng = target, world, rng
        self.groups = len(world.block_tokens)
        self.limits = target.constraints()
        most = min(world.tokens, self.limits.max_tokens or world.tokens)
        key = BucketKey(most, world.rows, (world.width,) * self.groups)
        with calling("buckets"):
            policy = target.runtime.buckets(world.tokens, world.rows, world.width)
        found = policy.cover(key)
        if found is None:
            raise Failed(f"no bucket covers {key}, the largest step that was announced")
        self.layout = StepLayout(
            found, world.num_rows, world.num_slots, world.num_bias, world.block_tokens
        )
        self.twin = oracle.empty(
            world.num_rows,
            (world.width,) * self.groups,
            world.num_slots,
            world.length,
            NUM_COLUMNS,
        )
        self.bias = rng.normal(size=(world.num_bias + 1, world.vocab)).astype(np.float32)
        self.bias[-1] = 0
        self.state = self._first_state()
        self.live: dict[int, int] = {}
        """Row -> history slot."""
        self.known: list[set[tuple[int, int]]] = [set() for _ in world.block_tokens]
        self.first = [0 if row % world.far_every else world.far for row in range(world.num_rows)]
        """Row -> where its prefix hits begin."""
        self.evidence = Evidence()

    def _first_state(self) -> DeviceState:
        """Zeros, but for scrap: what padding reads there is anything."""
        world, target, rng = self.world, self.target, self.rng
        with calling("block_tables.alloc"):
            widths = (world.width,) * self.groups
            tables = target.runtime.block_tables.alloc(world.num_rows, widths)
        params = np.tile(scrap_params(world.num_slots, world.num_bias), (world.num_rows + 1, 1))
        self.twin.params[:] = params
        counts = np.zeros((2, world.num_rows + 1), np.int32)
        counts[:, -1] = rng.integers(1, world.length, 2)
        history = np.zeros((world.num_slots + 1, world.length), np.int32)
        history[-1] = rng.integers(0, world.vocab, world.length)
        return DeviceState(
            tables,
            target.array(counts[0]),
            target.array(counts[1]),
            target.array(params.astype(np.int32)),
            target.array(history),
            target.array(self.bias, "float32"),
        )

    # ---- one step
    def step(self, *, rows: int | None = None) -> None:
        """A random legal step, checked."""
        rng, world = self.rng, self.world
        buffer = np.array(self.layout.template())
        v = self.layout.views(buffer)
        count = int(rng.integers(1, world.rows + 1)) if rows is None else rows
        most = self.limits.max_tokens or self.layout.key.tokens
        count = min(count, most)
        chosen = rng.permutation(world.num_rows)[:count].tolist()
        room = min(self.layout.key.tokens, most) - count
        plans: list[Plan] = []
        for row in chosen:
            fresh = self._is_fresh(row)
            hit = self._hit(row) if fresh else int(self.twin.num_tokens[row])
            length = 1
            if room and (fresh or (rng.random() < 0.4 and self.limits.chunk_multiple == 1)):
                length += int(rng.integers(0, min(room, world.length - hit - 1, 12) + 1))
            room -= length - 1
            plans.append((row, fresh, hit, length))
        plans.sort(key=lambda plan: plan[3] > 1)  # rows with one token stand first
        plans = self._allowed(plans)
        cells: list[list[list[int]]] = [[] for _ in world.block_tokens]
        told: list[list[int]] = []
        resets: list[list[int]] = []
        at = 0
        for s, (row, fresh, hit, length) in enumerate(plans):
            if fresh:
                resets.append([row, hit, *self._admit(row, hit, told)])
            for group, size in enumerate(world.block_tokens):
                self._grow(row, group, -(-(hit + length) // size), fresh, cells[group])
            ids = rng.integers(0, world.vocab, length)
            if rng.random() < 0.1:
                ids[-1] = rng.choice([world.vocab, 2**31 - 1])  # clipped; below -1 is reserved
            if not fresh:
                ids[0] = -1
            v["row"][s], v["query_start"][s + 1 :] = row, at + length
            v["token_ids"][at : at + length] = ids
            v["logit_rows"][s] = at + length - 1, s
            at += length
        v["resets"][: len(resets)] = np.array(resets, np.int32).reshape(-1, 2 + NUM_COLUMNS)
        singles = sum(length == 1 for *_, length in plans)
        v["split"][:] = split = (singles, singles, len(plans))
        self._fill(v, cells, told)
        drawn = np.full((self.layout.key.rows, 1), -1, np.int32)
        draws = rng.random(len(plans)) < 0.75
        found = rng.integers(0, world.vocab, len(plans))
        found[rng.random(len(plans)) < 0.3] = 0  # a token like any other
        drawn[: len(plans), 0] = np.where(draws, found, -1)
        lengths = [length for *_, length in plans]
        totals = [hit + length for _, _, hit, length in plans]
        host = HostStep(np.array(lengths, np.int32), np.array(totals, np.int32), split)
        self.run(buffer, host, drawn)

    def _allowed(self, plans: list[Plan]) -> list[Plan]:
        """What the declared limits leave of (row, fresh, hit, length), rows of one token first."""
        limits = self.limits
        if not limits.mixed_ok and plans:
            kinds = [(length > 1, fresh) for _, fresh, _, length in plans]
            kind = kinds[int(self.rng.integers(len(kinds)))]
            plans = [plan for plan, own in zip(plans, kinds, strict=True) if own == kind]
        if limits.max_prefills is None:
            return plans
        singles = sum(plan[3] == 1 for plan in plans)
        return plans[: singles + limits.max_prefills]

    def _is_fresh(self, row: int) -> bool:
        full = self.twin.num_tokens[row] >= self.world.length - 1
        return row not in self.live or bool(full) or self.rng.random() < 0.2

    def _hit(self, row: int) -> int:
        """A cached prefix of whole blocks of every group, often none."""
        step, world, first = (
            int(np.lcm.reduce(self.world.block_tokens)),
            self.world,
            self.first[row],
        )
        most = (world.length - 2 - first) // step
        return first + step * int(self.rng.integers(0, min(most, world.hits) + 1))

    def _admit(self, row: int, hit: int, told: list[list[int]]) -> list[int]:
        """The row's new parameters, none as it was; a history slot is told of the hit's last
        tokens, and of something else at the place of the row's own first token, which comes
        later and stays."""
        world, rng = self.world, self.rng
        taken = {slot for other, slot in self.live.items() if other != row}
        slot = int(rng.integers(0, world.num_slots + 1))
        slot = world.num_slots if slot in taken else slot
        self.live[row] = slot
        params = rng.integers(-(2**31), 2**31, NUM_COLUMNS).astype(np.int32)
        for column in FLOATS:
            params[column] = np.array(rng.uniform(0, 3), np.float32).view(np.int32)
        params[Column.TOP_K], params[Column.HELD_UNTIL] = rng.integers(0, 2**31, 2)
        params[Column.HISTORY_SLOT] = slot
        params[Column.BIAS_SLOT] = rng.integers(0, world.num_bias + 1)
        params[Column.HELD_IDS :] = rng.integers(-1, world.vocab, len(params[Column.HELD_IDS :]))
        if slot < world.num_slots:
            for position in range(max(0, hit - 20), hit + 1):
                told.append([slot, position, int(rng.integers(world.vocab))])
        found: list[int] = params.tolist()
        return found

    def _grow(
        self, row: int, group: int, columns: int, fresh: bool, cells: list[list[int]]
    ) -> None:
        """New blocks for a new row; for others what is missing, and now and then another block."""
        for column in range(self.first[row] // self.world.block_tokens[group], columns):
            cell = (row, column)
            moved = self.rng.random() < 0.02
            if fresh or moved or cell not in self.known[group]:
                self.known[group].add(cell)
                block = int(self.rng.integers(1, self.world.largest_block + 1))
                cells.append([row, column, block])

    def _fill(
        self, v: dict[str, Numbers], cells: list[list[list[int]]], told: list[list[int]]
    ) -> None:
        """What the step's own lists cannot hold goes ahead of it."""
        room, ahead = self.layout.num_changes, []
        for group, changes in enumerate(cells):
            kept = np.array(changes[:room], np.int32).reshape(-1, 3)
            v[f"table_changes{group}"][: len(kept)] = kept
            ahead.append(changes[room:])
        kept = np.array(told[:room], np.int32).reshape(-1, 3)
        v["history_changes"][: len(kept)] = kept
        self.apply(ahead, told[room:])

    # ---- on the device
    def apply(self, cells: Sequence[list[list[int]]], told: list[list[int]]) -> None:
        world, target = self.world, self.target
        runtime, groups = target.runtime, self.groups

        def fn(state: DeviceState, tables: Any, history: Any) -> tuple[DeviceState]:
            changes = Changes(tuple(tables[g] for g in range(groups)), history)
            return (runtime.ops.apply(runtime.block_tables, state, changes),)

        run = target.compile(
            ("stepping apply", world), fn, name="apply", consumes=(0,), num_results=0
        )
        for at in range(0, max([len(told), *map(len, cells)]), world.ahead):
            tables = np.zeros((groups, world.ahead, 3), np.int32)
            tables[:, :, 0] = world.num_rows
            for group, changes in enumerate(cells):
                part = np.array(changes[at : at + world.ahead], np.int32).reshape(-1, 3)
                tables[group, : len(part)] = part
            history = np.tile(np.array([world.num_slots, 0, 0], np.int32), (world.ahead, 1))
            part = np.array(told[at : at + world.ahead], np.int32).reshape(-1, 3)
            history[: len(part)] = part
            oracle.apply(self.twin, list(tables), history)
            arrays = target.array(tables), target.array(history)
            tables[...], history[...] = -(2**20), -(2**20)  # asarray copies
            with calling("program 'apply'"):
                (self.state,) = run(self.state, *arrays)

    def run(self, buffer: Numbers, host: HostStep, drawn: Numbers) -> None:
        """One packed step through `upload`, and the comparison of all that follows."""
        world, target, layout = self.world, self.target, self.layout
        ops, block_tables = target.ops, target.runtime.block_tables

        def fn(state: DeviceState, device_step: DeviceStep, tokens: Any) -> tuple[Any, ...]:
            step = layout.unpack(device_step.buffer)
            view, state = ops.expand(block_tables, state, step, world.block_tokens, world.vocab)
            accepted, state = ops.advance(state, step, view, tokens)
            return state, view, accepted, ops.cast(view.valid, "int32")

        run = target.compile(
            ("stepping", world, layout.key),
            fn,
            name="step",
            consumes=(0,),
            num_results=3,
            key=layout.key,
        )
        given = {name: x.copy() for name, x in layout.views(buffer).items()}
        with calling("upload"):
            device_step = target.runtime.upload(buffer, host, layout.key)
        buffer[:] = -(2**20)  # the array may be reused on return
        tokens = target.array(drawn)
        with calling("program 'step'"):
            results = run(self.state, device_step, tokens)
        self.state = results[0]
        view, accepted, _ = target.fetch(tuple(results[1:]))
        want = oracle.expand(self.twin, given, world.block_tokens, world.vocab)
        self._compare_view(view, want)
        oracle.advance(self.twin, given, want, drawn)
        self._equal(accepted, np.zeros(layout.key.rows), "advance: num_accepted without drafts")
        self.compare_state()

    def _cells(self) -> tuple[Any, ...]:
        """Every cell of every table and some columns past it, looked up: how a backend keeps them
        is its own."""
        world, groups = self.world, self.groups
        tables, width = self.target.runtime.block_tables, self.world.width + PAST
        rows, columns = np.divmod(np.arange(world.num_rows * width), width)

        def fn(device: Any, rows: Any, columns: Any) -> tuple[Any, ...]:
            return tuple(tables.lookup(device, group, rows, columns) for group in range(groups))

        where = (self.target.array(x.astype(np.int32)) for x in (rows, columns))
        return self.target.call(("stepping cells", world), fn, self.state.tables, *where)

    def _equal(self, found: Any, want: Any, what: str, *axes: str) -> None:
        found = np.asarray(found).astype(np.int64)
        self.evidence += require_equal(found, np.asarray(want, np.int64), what, axes=axes)

    def _compare_view(self, view: Any, want: oracle.View) -> None:
        key, used, rows = self.layout.key, len(want.token_ids), len(want.seq_lens)
        rest = key.tokens - used
        self._equal(view.valid, [1] * used + [0] * rest, "expand: valid", "token")
        self._equal(
            np.asarray(view.token_ids)[:used],
            want.token_ids,
            "expand: token ids (-1 is the row's last token; clipped to the vocabulary)",
            "token",
        )
        padded = np.asarray(view.token_ids)[used:]
        require(
            bool(((padded >= 0) & (padded < self.world.vocab)).all()),
            f"expand: padding tokens have ids {padded.tolist()}, outside the vocabulary",
        )
        self._equal(view.positions, want.positions + [0] * rest, "expand: positions", "token")
        padding = [self.world.num_rows] * rest
        self._equal(view.row, want.row + padding, "expand: row of the state", "token")
        self._equal(
            np.asarray(view.sequence)[:used],
            want.sequence,
            "expand: row of the step that owns the token",
            "token",
        )
        for group, slots in enumerate(want.slots):
            size = self.world.block_tokens[group]
            self._equal(
                view.slots[group],
                slots + [0] * rest,
                f"expand: slots of group {group} ({size} tokens per block)",
                "token",
            )
        lens = want.seq_lens + [0] * (key.rows - rows)
        self._equal(view.seq_lens, lens, "expand: seq_lens (with this step's tokens)", "row")

    def compare_state(self) -> None:
        """Rows and slots that somebody may own; scrap is anything."""
        state, twin = self.target.fetch((self.state[1:],))[0], self.twin
        state = DeviceState((), *state)
        n, p = twin.scrap, twin.scrap_slot
        for group, (found, table) in enumerate(zip(self._cells(), twin.tables)):
            what = f"state: table of group {group} (columns past it read its last cell)"
            exact = np.pad(table[:-1], ((0, 0), (0, PAST)), "edge")
            self._equal(found.reshape(n, -1), exact, what, "row", "column")
        self._equal(state.num_tokens[:n], twin.num_tokens[:n], "state: num_tokens", "row")
        self._equal(state.last_token[:n], twin.last_token[:n], "state: last_token", "row")
        self._equal(state.params[:n], twin.params[:n], "state: params", "row", "column")
        self._equal(state.history[:p], twin.history[:p], "state: history", "slot", "position")
        self.evidence += require_equal(
            np.asarray(state.bias), self.bias, "state: bias, which no step changes"
        )


def world_of(**changes: Any) -> World:
    return replace(World(), **changes)
