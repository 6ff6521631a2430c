"""What must hold of a scheduler's plan and of its cache, checked in every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vllm_core.engine import prefix_cache
from vllm_core.engine.core import EngineCore
from vllm_core.engine.request import Sequence
from vllm_core.engine.scheduler import Scheduler
from vllm_core.plan import Plan


class Write(NamedTuple):
    """Who wrote one place of a block last."""

    group: int
    sequence: Sequence
    position: int


class Watch:
    """Looks at each plan as it leaves the scheduler, and keeps what the device has: its tables, and
    who wrote which place of which block."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        kv = scheduler.kv
        self.tables = [np.zeros_like(table) for table in kv.blocks]
        self.num_plans = 0
        self.written: list[dict[tuple[int, int], Write]] = [{} for _ in kv.pools]
        """Per pool, by (block, place in it)."""

    def forget(self) -> None:
        """The device lost its state and its cache."""
        for table in self.tables:
            table.fill(0)
        for places in self.written:
            places.clear()

    def see(self, plan: Plan | None) -> None:
        check_blocks(self.scheduler)
        check_rows(self.scheduler)
        if plan is None:
            return
        self.num_plans += 1
        self._check_limits(plan)
        self._check_hits(plan)
        self._check_writers(plan)
        self._check_tables(plan)

    def _check_limits(self, plan: Plan) -> None:
        limits, q = self.scheduler.limits, plan.query_len
        constraints = limits.constraints
        budget = min(limits.token_budget, constraints.max_tokens or limits.token_budget)
        assert 0 < q.sum() == len(plan.token_ids) <= budget
        assert (q > 0).all() and len(set(plan.rows.tolist())) == len(q)
        assert (q[: plan.num_single] == 1).all() and (q[plan.num_single :] > 1).all()
        assert len(q) <= limits.max_draws
        if constraints.max_prefills is not None:
            assert (q > 1).sum() <= constraints.max_prefills
        r = self.scheduler.rows
        decodes = plan.start >= r.goal[plan.rows]
        if not constraints.mixed_ok:
            assert decodes.all() or not decodes.any()
            assert plan.num_single in (0, len(q)), "to the device a single token is a decoding row"
        cut = ~decodes & ~plan.draws
        assert (q[cut] % constraints.chunk_multiple == 0).all()
        assert (plan.start + q <= r.end[plan.rows]).all(), "a row runs past its end"
        assert len(plan.resets) <= len(plan.rows)
        assert set(plan.resets[:, 0].tolist()) <= set(plan.rows.tolist())

    def _check_hits(self, plan: Plan) -> None:
        """Every block that a prefix hit brings was written by earlier steps, in every place that
        the row can see, from the row's own tokens."""
        kv = self.scheduler.kv
        starts = dict(zip(plan.rows.tolist(), plan.start.tolist(), strict=True))
        for row, hit in plan.resets[:, :2].tolist():
            sequence = self.scheduler.rows.owner[row]
            assert starts[row] == hit, "the device and the plan differ about the hit"
            assert sequence.num_preemptions or sequence.num_hit_tokens == hit
            own = tokens_of(self.scheduler, sequence)
            for g, group in enumerate(kv.groups):
                for column in range(group.first_live(hit), hit // group.block_tokens):
                    self._check_content(g, int(kv.blocks[g][row, column]), sequence, column, own)

    def _check_content(
        self, g: int, block: int, sequence: Sequence, column: int, own: list[int]
    ) -> None:
        """The block was written in full, as this column of a sequence that starts with the tokens
        `own` up to there."""
        scheduler = self.scheduler
        group = scheduler.kv.groups[g]
        for place in range(group.block_tokens):
            position = column * group.block_tokens + place
            write = self.written[group.pool].get((block, place))
            assert write is not None, "a block is shared that no step has written"
            assert (write.group, write.position) == (g, position)
            theirs = tokens_of(scheduler, write.sequence)
            assert len(theirs) > position, "a token that the host does not know is shared"
            assert theirs[: position + 1] == own[: position + 1]
            root = sequence.request.hash_root
            assert root == write.sequence.request.hash_root, "shared with a stranger"

    def _check_writers(self, plan: Plan) -> None:
        kv = self.scheduler.kv
        writers: set[tuple[int, int]] = set()
        for row, start, q in zip(
            plan.rows.tolist(), plan.start.tolist(), plan.query_len.tolist(), strict=True
        ):
            sequence = self.scheduler.rows.owner[row]
            for g, group in enumerate(kv.groups):
                size, pool = group.block_tokens, kv.pools[group.pool]
                for column in range(start // size, (start + q - 1) // size + 1):
                    block = int(kv.blocks[g][row, column])
                    assert block > 0, "a valid token is written to the null block"
                    assert (group.pool, block) not in writers, f"block {block} has two writers"
                    writers.add((group.pool, block))
                    assert pool.references[block] == 1, f"block {block} is written while shared"
                    begin, end = max(start, column * size), min(start + q, (column + 1) * size)
                    for position in range(begin, end):
                        write = Write(g, sequence, position)
                        self.written[group.pool][block, position % size] = write
                    if block in pool.key_of:
                        self._check_findable(g, block, sequence, column)

    def _check_findable(self, g: int, block: int, sequence: Sequence, column: int) -> None:
        """A block that this step writes to may be found from now on if the step completes it."""
        group, own = self.scheduler.kv.groups[g], tokens_of(self.scheduler, sequence)
        self._check_content(g, block, sequence, column, own)
        hashes: list[bytes] = []
        first = sequence.request.hash_root
        assert first is not None, "a block that is nobody else's can be found"
        tokens = np.array(own[: (column + 1) * group.block_tokens], np.int32)
        prefix_cache.extend(hashes, first, tokens, group.block_tokens)
        assert self.scheduler.kv.pools[group.pool].key_of[block] == (g, hashes[column])

    def _check_tables(self, plan: Plan) -> None:
        kv = self.scheduler.kv
        for g, changes in enumerate(plan.table_changes):
            cells = [tuple(c[:2]) for c in changes.tolist()]
            assert len(set(cells)) == len(cells), "two changes of one cell in one step"
            for row, column, block in changes.tolist():
                assert kv.blocks[g][row, column] == block
                self.tables[g][row, column] = block
            for row in plan.rows.tolist():
                live = slice(int(kv.first_live[g, row]), int(kv.num_blocks[g, row]))
                np.testing.assert_array_equal(self.tables[g][row, live], kv.blocks[g][row, live])


def watch(core: EngineCore) -> Watch:
    """Checks every plan of an engine, and that a device which keeps tables has the same ones."""
    scheduler: Any = core.scheduler
    seen, schedule, execute = Watch(scheduler), scheduler.schedule, core.runner.execute

    def schedule_and_see() -> Plan | None:
        plan: Plan | None = schedule()
        seen.see(plan)
        return plan

    def execute_and_see(plan: Plan) -> Any:
        handle = execute(plan)
        state: Any = core.runner.state
        for g, table in enumerate(state.tables):
            np.testing.assert_array_equal(
                core.runner.runtime.ops.host(table)[plan.rows], seen.tables[g][plan.rows]
            )
        return handle

    scheduler.schedule = schedule_and_see
    if hasattr(core.runner.runtime.ops, "host") and not core.runner.runtime.caps.static_shapes:
        core.runner.execute = execute_and_see  # type: ignore[method-assign]
    return seen


def tokens_of(scheduler: Scheduler, sequence: Sequence) -> list[int]:
    """Prompt and output, as far as the host knows them."""
    is_running = sequence.row >= 0
    output = scheduler.rows.output(sequence.row) if is_running else sequence.saved
    return [*sequence.request.prompt, *output]


def check_blocks(scheduler: Scheduler) -> None:
    """References are those of the tables; a block is free exactly without one; keys are unique."""
    kv = scheduler.kv
    counts = [np.zeros(pool.num_blocks, np.int64) for pool in kv.pools]
    for g, group in enumerate(kv.groups):
        for row in range(scheduler.rows.num_rows):
            used = int(kv.num_blocks[g, row])
            cells = kv.blocks[g][row]
            assert not cells[used:].any(), "a cell behind the end of a row"
            assert not cells[: int(kv.first_live[g, row])].any(), "a cell that left the window"
            assert cells[int(kv.first_live[g, row]) : used].all(), "a hole in a table"
            if not scheduler.rows.active[row]:
                assert used == 0, "a row without an owner holds blocks"
            np.add.at(counts[group.pool], cells[cells > 0], 1)
    for pool, count in zip(kv.pools, counts, strict=True):
        assert pool.references == count.tolist()
        assert set(pool.free) == {b for b in range(1, pool.num_blocks) if not count[b]}
        assert pool.by_key == {key: block for block, key in pool.key_of.items()}
        assert 0 not in pool.key_of and 0 not in pool.free


def check_rows(scheduler: Scheduler) -> None:
    """known, computed and bound agree; rows and slots are free or owned once."""
    r, limits = scheduler.rows, scheduler.limits
    active = np.flatnonzero(r.active)
    assert sorted([*r.free, *active.tolist()]) == list(range(r.num_rows))
    for row in active.tolist():
        sequence = r.owner[row]
        assert sequence.row == row and not sequence.is_finished
        assert r.computed[row] <= r.bound[row] <= r.known[row] + r.pending[row]
        assert r.pending[row] >= 0 and r.goal[row] <= r.known[row] < r.end[row]
        assert r.known[row] + r.pending[row] <= r.end[row]
        assert sequence.request.request_id in scheduler.requests
    for free, own, total in (
        (scheduler.news.free_history, r.history_slot, limits.num_history_slots),
        (scheduler.news.free_bias, r.bias_slot, limits.num_bias_slots),
    ):
        used = [int(own[row]) for row in active if own[row] < total]
        assert sorted([*free, *used]) == list(range(total))


def check_empty(scheduler: Scheduler) -> None:
    """Nothing runs: every block is free (cached or not), every row and slot too."""
    check_blocks(scheduler)
    check_rows(scheduler)
    assert not scheduler.requests and not scheduler.rows.active.any() and not scheduler.waiting
    for pool in scheduler.kv.pools:
        assert pool.num_free == pool.num_usable and not any(pool.references)
