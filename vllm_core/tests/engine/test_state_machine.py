"""Scheduler and KV cache against a small model of them, without a device.

Results are made up: token i of a sequence follows from the request and i alone, so that a token
lost, doubled or out of order shows whatever was preempted in between. Steps come back late, as they
do when the device runs behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_core.backend import StepConstraints
from vllm_core.engine.kv_cache import KVCache
from vllm_core.engine.limits import Limits
from vllm_core.engine.request import Request, Sequence
from vllm_core.engine.scheduler import Scheduler
from vllm_core.models import kv_groups
from vllm_core.ops import Logprobs, StepResult
from vllm_core.plan import Plan
from vllm_core.runner.memory import AHEAD
from vllm_core.tests.engine import mixes
from vllm_core.tests.engine.tiny import (
    FULL,
    MAX_LEN,
    TWO_GROUPS,
    TWO_POOLS,
    make_request,
    make_spec,
)
from vllm_core.tests.engine.watch import (
    Watch,
    check_blocks,
    check_empty,
    check_rows,
    tokens_of,
)

MAX_IN_FLIGHT = 3
STOP = 5


def drawn(sequence: Sequence, position: int) -> int:
    """What the made-up device draws at a position."""
    first = sum(sequence.request.prompt) + 31 * sequence.index
    return (first * 7 + position * 13) % 23


@dataclass
class Expected:
    """What the model knows of one submitted sequence."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    is_ended: bool = False
    is_poisoned: bool = False

    def full_answer(self) -> list[int]:
        request, p = self.sequence.request, self.sequence.request.params
        tokens: list[int] = []
        while len(request.prompt) + len(tokens) < request.end:
            tokens.append(drawn(self.sequence, len(request.prompt) + len(tokens)))
            if tokens[-1] in request.stop_ids and len(tokens) >= p.min_tokens:
                break
        return tokens


class SchedulerMachine(RuleBasedStateMachine):
    """Rules are what callers and devices do; the invariants hold after each of them."""

    @initialize(
        windows=st.sampled_from((FULL, TWO_GROUPS, TWO_POOLS)),
        block_tokens=st.sampled_from((1, 2, 4, 8)),
        slack=st.sampled_from((0, 2, 60)),
        num_rows=st.integers(1, 5),
        budget=st.sampled_from((4, 9, 40)),
        policy=st.sampled_from(("fcfs", "priority")),
        caching=st.booleans(),
        constraints=mixes.constraints,
    )
    def start(
        self,
        windows: tuple[int | None, ...],
        block_tokens: int,
        slack: int,
        num_rows: int,
        budget: int,
        policy: str,
        caching: bool,
        constraints: StepConstraints,
    ) -> None:
        groups = kv_groups(make_spec("float32", windows), block_tokens)
        pools = sorted({g.pool for g in groups})
        longest = -(-MAX_LEN // block_tokens) * len(groups) // len(pools) + 3
        kv = KVCache(groups, dict.fromkeys(pools, longest + slack), num_rows, MAX_LEN + AHEAD)
        limits = Limits(
            num_rows=num_rows,
            token_budget=budget,
            max_model_len=MAX_LEN,
            num_history_slots=min(num_rows, 2),
            num_bias_slots=min(num_rows, 2),
            max_draws=num_rows,
            constraints=constraints,
            enable_prefix_caching=caching,
            policy=policy,
        )
        self.scheduler = Scheduler(kv, limits)
        self.watch = Watch(self.scheduler)
        self.in_flight: list[Plan] = []
        self.expected: dict[int, Expected] = {}
        self.requests: list[Request] = []
        self.started: set[int] = set()
        """Arrival numbers of the requests that have run."""
        self.paused: set[str] = set()
        self.ever_paused: set[int] = set()
        self.num_added = 0

    # ---------------------------------------------------------------- what callers do
    @rule(
        prefix=st.sampled_from(mixes.PREFIXES),
        rest=st.lists(st.integers(0, 22), min_size=1, max_size=12),
        max_tokens=st.integers(1, 14),
        min_tokens=st.integers(0, 3),
        n=st.sampled_from((1, 1, 1, 2, 3)),
        penalty=st.sampled_from((0.0, 0.0, 0.5)),
        banned=st.sampled_from(((), (), (1,))),
        prompt_logprobs=st.sampled_from((None, None, 1)),
        priority=st.integers(0, 2),
    )
    def add(self, prefix: list[int], rest: list[int], priority: int, n: int, **params: Any) -> None:
        params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
        request = make_request(
            prefix + rest,
            f"r{self.num_added}",
            priority,
            n=n,
            presence_penalty=params.pop("penalty"),
            banned_token_ids=params.pop("banned"),
            stop_token_ids=(STOP,),
            **params,
        )
        self.num_added += 1
        self.scheduler.add(request)
        self.requests.append(request)
        for sequence in request.sequences:
            self.expected[id(sequence)] = Expected(sequence)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        request = self.scheduler.requests[name]
        open_ones = [s for s in request.sequences if not s.is_finished]
        self.scheduler.abort(name)
        assert all(s.finish_reason == "abort" for s in open_ones)
        for sequence in open_ones:
            self.expected[id(sequence)].is_ended = True

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def finish_by_text(self, data: st.DataObject) -> None:
        """A stop string was found in a sequence's text."""
        live = [e.sequence for e in self.expected.values() if not e.sequence.is_finished]
        sequence = data.draw(st.sampled_from(live))
        self.scheduler.finish(sequence, "stop", "text")
        self.expected[id(sequence)].is_ended = True

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def pause_or_resume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.pause(name, name not in self.paused)
        self.paused ^= {name}
        self.ever_paused.add(self.scheduler.requests[name].arrival)

    # ---------------------------------------------------------------- what loop and device do
    @precondition(lambda self: len(self.in_flight) < MAX_IN_FLIGHT)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        self.watch.see(plan)
        if plan is None:
            is_idle = not self.in_flight and not self.paused & self.scheduler.requests.keys()
            assert not (is_idle and self.scheduler.requests), "a step is empty for no reason"
            return
        self.in_flight.append(plan)
        self._check_order(plan)
        for i, sequence in enumerate(plan.owners):
            assert sequence.request.request_id not in self.paused, "a paused request ran"
            self._check_tokens(plan, i)

    def _check_order(self, plan: Plan) -> None:
        """First come, first given a row, but for those whose next block this very step computes."""
        new = {s.request.arrival for s in plan.owners} - self.started
        self.started |= new
        if self.scheduler.limits.policy != "fcfs" or not new:
            return
        for request in self.scheduler.requests.values():
            is_before = request.arrival < max(new) and request.arrival not in self.started
            is_overtaken = is_before and request.sequences[0].row < 0
            if is_overtaken and request.arrival not in self.ever_paused:
                assert self._waits_for_a_block(request, plan), "overtaken for no reason"

    def _waits_for_a_block(self, request: Request, plan: Plan) -> bool:
        """Some row of the plan computes a part of a full block that the request could share."""
        size, root = int(self.scheduler.kv.sizes[0]), request.hash_root
        usable = (len(request.prompt) - 1) // size * size
        if request.needs_prompt_scores or root is None:
            return False
        for owner, start, q in zip(plan.owners, plan.start, plan.query_len, strict=True):
            own = tokens_of(self.scheduler, owner)
            same = 0
            while same < usable and own[same : same + size] == request.prompt[same : same + size]:
                same += size
            if start < same and q > 0 and owner.request.hash_root == root:
                return True
        return False

    def _check_tokens(self, plan: Plan, i: int) -> None:
        """The ids sent are the sequence's own at these places, or the one that the device drew."""
        sequence = plan.owners[i]
        own = [*sequence.request.prompt, *self.expected[id(sequence)].full_answer()]
        begin = int(plan.query_len[:i].sum())
        sent = plan.token_ids[begin : begin + plan.query_len[i]].tolist()
        start = int(plan.start[i])
        assert all(
            token == -1 if place >= self.scheduler.rows.goal[plan.rows[i]] else token == own[place]
            for place, token in enumerate(sent, start)
        )

    @precondition(lambda self: self.in_flight)
    @rule(poison=st.integers(0, 40))
    def fetch(self, poison: int) -> None:
        """The oldest step comes back; rarely one of its rows drew from NaN."""
        plan = self.in_flight.pop(0)
        n = len(plan.rows)
        tokens, fault = np.full((n + 2, 1), -1, np.int32), np.zeros(n + 2, np.int32)
        for i, sequence in enumerate(plan.owners):
            if plan.draws[i]:
                tokens[i] = drawn(sequence, int(plan.start[i] + plan.query_len[i]))
        if poison < n and plan.draws[poison]:
            fault[poison] = 1
        scores = {t.place: _scores(t.targets) for t in plan.prompt_targets}
        before = {id(s): s.is_finished for s in plan.owners}
        events = self.scheduler.update(plan, StepResult(tokens, fault, fault, None), scores)
        if poison < n and plan.draws[poison]:
            sequence = plan.owners[poison]
            assert not self._can_be_shared(sequence), "what a poisoned sequence computed is found"
            assert sequence.is_finished or sequence.is_apart, "it must end, or find nothing again"
        for event in events:
            known = self.expected[id(event.sequence)]
            assert not known.is_ended, "an event of a sequence that had ended"
            if event.prompt_scores is not None:
                self._check_scores(event.sequence, *event.prompt_scores)
            if event.token is not None:
                known.tokens.append(event.token)
        for sequence in plan.owners:
            known = self.expected[id(sequence)]
            if sequence.is_finished and not before[id(sequence)]:
                assert not known.is_ended
                known.is_ended = True
                known.is_poisoned = sequence.finish_reason == "error"
                if not known.is_poisoned:
                    assert known.tokens == known.full_answer()
                    by_stop = known.tokens[-1] in sequence.request.stop_ids
                    assert sequence.finish_reason == ("stop" if by_stop else "length") or (
                        by_stop and len(known.tokens) < sequence.request.params.min_tokens
                    )

    def _can_be_shared(self, sequence: Sequence) -> bool:
        kv = self.scheduler.kv
        return any(
            kv.pools[group.pool].find((g, own)) is not None
            for g, group in enumerate(kv.groups)
            for own in sequence.hashes.get(group.block_tokens, [])
        )

    def _check_scores(self, sequence: Sequence, first: int, scores: Logprobs) -> None:
        request = sequence.request
        assert sequence.index == 0 and request.params.prompt_logprobs is not None
        assert request.num_prompt_scored == first - 1 + len(scores.rank)
        own = request.prompt[first : first + len(scores.rank)]
        assert scores.ids[:, 0].tolist() == own

    @rule()
    def lose_the_device(self) -> None:
        self.in_flight.clear()
        self.scheduler.restart()
        self.watch.forget()
        assert not self.scheduler.rows.active.any()
        assert all(not pool.key_of for pool in self.scheduler.kv.pools)

    # ---------------------------------------------------------------- what always holds
    @invariant()
    def blocks_rows_and_slots_are_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            check_blocks(self.scheduler)
            check_rows(self.scheduler)

    @invariant()
    def tokens_given_out_are_a_start_of_the_answer(self) -> None:
        for known in getattr(self, "expected", {}).values():
            assert known.tokens == known.full_answer()[: len(known.tokens)]
            assert known.is_ended == known.sequence.is_finished

    @invariant()
    def sequences_that_live_are_somewhere_exactly_once(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        waiting = self.scheduler.waiting.waiting()
        assert len(set(map(id, waiting))) == len(waiting)
        for request in self.requests:
            is_listed = self.scheduler.requests.get(request.request_id) is request
            assert is_listed == (not request.is_finished)
            for sequence in request.sequences:
                if sequence.is_finished:
                    assert sequence.row == -1
                    continue
                sibling = sequence.index > 0 and not request.sequences[0].is_prompt_done
                places = (sequence.row >= 0) + (sequence in waiting) + (sequence.num_in_flight > 0)
                assert places == (0 if sibling else 1)

    def teardown(self) -> None:
        """Everything that was submitted ends, once, and leaves nothing behind."""
        if not hasattr(self, "scheduler"):
            return
        for name in sorted(self.paused & self.scheduler.requests.keys()):
            self.scheduler.pause(name, False)
        self.paused.clear()
        for _ in range(4000):
            if not self.scheduler.has_work and not self.in_flight:
                break
            self.schedule()
            if self.in_flight:
                self.fetch(poison=99)
        assert not self.scheduler.has_work, "the scheduler makes no progress"
        self.tokens_given_out_are_a_start_of_the_answer()
        for request in self.requests:
            scored = request.params.prompt_logprobs is not None
            if scored and request.sequences[0].finish_reason in ("stop", "length"):
                if request.sequences[0].stop_reason != "text":
                    assert request.num_prompt_scored == len(request.prompt) - 1
        check_empty(self.scheduler)


def _scores(targets: np.ndarray[Any, Any]) -> Logprobs:
    ids = np.stack([targets, targets], 1).astype(np.int32)
    return Logprobs(ids, np.zeros(ids.shape, np.float32), np.ones(len(ids), np.int32))


SchedulerMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestScheduler = SchedulerMachine.TestCase
