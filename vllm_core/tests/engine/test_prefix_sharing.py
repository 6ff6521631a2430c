"""Requests that arrive together share their prefix: blocks are findable once a step is planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import StepConstraints
from vllm_core.cli.null_core import VOCAB_SIZE, open_null_core
from vllm_core.engine.core import EngineCore
from vllm_core.engine.request import Request
from vllm_core.ops import StepResult
from vllm_core.params import SamplingParams
from vllm_core.plan import Plan
from vllm_core.tests.engine.tiny import (
    FULL,
    TWO_GROUPS,
    TWO_POOLS,
    Setup,
    make_core,
    make_request,
    run,
    run_alone,
)
from vllm_core.tests.engine.watch import check_empty, watch

SHARED = list(range(10, 30))
"""Five blocks of four tokens."""


def record(core: EngineCore) -> list[Plan]:
    """The plans that the engine is going to make."""
    plans: list[Plan] = []
    scheduler: Any = core.scheduler
    schedule = scheduler.schedule

    def schedule_and_keep() -> Plan | None:
        plan: Plan | None = schedule()
        plans.extend([plan] if plan is not None else [])
        return plan

    scheduler.schedule = schedule_and_keep
    return plans


def names(plan: Plan | None) -> list[str]:
    return [] if plan is None else sorted(s.request.request_id for s in plan.owners)


def plan_step(core: EngineCore) -> Plan:
    plan = core.scheduler.schedule()
    assert plan is not None, "the step is empty, though there is work"
    return plan


def fetch(core: EngineCore, plan: Plan, *bad: str) -> list[tuple[str, int]]:
    """The step comes back: token 1 for everybody, NaN for these requests -> tokens given out."""
    n = len(plan.rows)
    fault = np.array([s.request.request_id in bad for s in plan.owners], np.int32)
    tokens = np.where(plan.draws, 1, -1).astype(np.int32)
    result = StepResult(tokens[:, None], np.zeros(n, np.int32), fault, None)
    events = core.scheduler.update(plan, result)
    return [(e.sequence.request.request_id, e.token) for e in events if e.token is not None]


def cached(core: EngineCore, tokens: list[int]) -> int:
    """How many tokens of a prompt could be shared now."""
    core.add(make_request(tokens, "probe", max_tokens=1))
    scheduler = core.scheduler
    request = scheduler.requests["probe"]
    held: list[Any] = []
    row = scheduler._admit(set(), held)
    assert row is not None and not held
    hit = request.sequences[0].num_hit_tokens
    core.abort("probe")
    return hit


# ---------------------------------------------------------------- arriving together
@pytest.mark.parametrize("token_budget", [1024, 4608])
def test_a_prefix_that_32_requests_share_is_computed_once(token_budget: int) -> None:
    core = open_null_core(
        num_rows=32, context=2048, block_size=32, num_blocks=1200, token_budget=token_budget
    )
    plans = record(core)
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCAB_SIZE, 960).tolist()
    for i in range(32):
        prompt = shared + rng.integers(0, VOCAB_SIZE, 64).tolist()
        params = SamplingParams(max_tokens=4, ignore_eos=True, seed=i)
        core.add(Request(f"{i}", prompt, params, (), 2048, VOCAB_SIZE))
    while core.has_work:
        core.step()
    computed = sum(int(p.query_len[p.start < 1024].sum()) for p in plans)
    assert computed == 960 + 32 * 64
    assert core.stats()["prefix_hit_tokens"] == 31 * 960


@pytest.mark.parametrize("windows", [FULL, TWO_GROUPS, TWO_POOLS])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("token_budget", [6, 25, 64])
def test_sharers_get_the_tokens_that_they_get_alone(
    windows: tuple[int | None, ...], is_async: bool, token_budget: int
) -> None:
    setup = Setup(windows=windows, is_async=is_async, token_budget=token_budget)
    core = make_core(setup)
    watch(core)
    requests = [
        make_request([*SHARED, i], f"r{i}", temperature=0, max_tokens=8, logprobs=1)
        for i in range(6)
    ]
    streams = run(core, requests)
    for request in requests:
        own, alone = streams[request.request_id, 0], run_alone(setup, request)
        assert own.tokens == alone.tokens
        for mine, theirs in zip(own.logprobs, alone.logprobs, strict=True):
            np.testing.assert_allclose(mine.values, theirs.values, atol=1e-6)
    assert [r.sequences[0].num_hit_tokens for r in requests] == [0] + [20] * 5
    check_empty(core.scheduler)


def test_a_long_prefix_in_chunks_is_computed_once_too() -> None:
    """Chunks that end within a block: its sharers wait until it is full."""
    core = make_core(Setup(token_budget=7))
    plans = record(core)
    run(core, [make_request([*SHARED, i], f"r{i}", max_tokens=1) for i in range(4)])
    assert sum(int(p.query_len.sum()) for p in plans) == 20 + 4


def test_a_step_with_room_left_beside_a_part_of_a_block_shares_it_all_the_same() -> None:
    """A chunk of 4 tokens leaves 2 of the budget to others, whose next block it does not fill."""
    constraints = StepConstraints(chunk_multiple=4)
    core = make_core(Setup(block_tokens=8, token_budget=6, constraints=constraints))
    plans = record(core)
    run(core, [make_request([*SHARED, i], f"r{i}", max_tokens=1) for i in range(4)])
    assert sum(int(p.query_len.sum()) for p in plans) == 16 + 4 * 5


def test_prompts_that_part_later_share_what_each_other_computed_first() -> None:
    core = make_core(Setup())
    plans = record(core)
    prompts = [[*SHARED[:8], *range(40, 49)], [*SHARED[:16], *range(50, 55)], [*SHARED, 1]]
    run(core, [make_request(p, f"r{i}", max_tokens=1) for i, p in enumerate(prompts)])
    assert [names(p) for p in plans] == [["r0"], ["r1"], ["r2"]]
    assert [int(p.query_len.sum()) for p in plans] == [17, 21 - 8, 21 - 16]


# ---------------------------------------------------------------- who waits, and for how long
def test_only_those_who_would_compute_it_again_wait_and_just_one_step() -> None:
    core = make_core(Setup())
    plans = record(core)
    prompts = {"a1": [*SHARED, 1], "a2": [*SHARED, 2], "b1": [5, *SHARED], "b2": [5, *SHARED]}
    run(core, [make_request(p, name, max_tokens=1) for name, p in (prompts | {"c": [6]}).items()])
    assert [names(p) for p in plans] == [["a1", "b1", "c"], ["a2", "b2"]]


def test_what_ends_in_the_block_that_is_computed_does_not_wait_for_it() -> None:
    """At least one token must be computed, so that it could not share the block."""
    core = make_core(Setup())
    plans = record(core)
    run(core, [make_request(SHARED[:8], f"r{i}", max_tokens=1) for i in range(3)])
    assert [names(p) for p in plans] == [["r0"], ["r1", "r2"]]


def test_strangers_do_not_wait_for_each_other() -> None:
    """Other salts, or no prefix caching: nothing to share."""
    for is_caching in (True, False):
        core = make_core(Setup(enable_prefix_caching=is_caching))
        plans = record(core)
        requests = [make_request(SHARED, name, max_tokens=1) for name in "ab"]
        if is_caching:
            requests[1].salt = b"b"
        run(core, requests)
        assert [names(p) for p in plans] == [["a", "b"]]


def test_whoever_wants_prompt_scores_does_not_wait_but_is_waited_for() -> None:
    core = make_core(Setup())
    plans = record(core)
    run(
        core,
        [
            make_request(SHARED, "scored", max_tokens=1, prompt_logprobs=0),
            make_request(SHARED, "too", max_tokens=1, prompt_logprobs=0),
            make_request(SHARED, "plain", max_tokens=1),
        ],
    )
    assert [names(p) for p in plans] == [["scored", "too"], ["plain"]]


def test_others_leave_a_row_to_each_that_waits() -> None:
    core = make_core(Setup(num_rows=3))
    plans = record(core)
    long = {"max_tokens": 12, "ignore_eos": True}
    for name, tail in (("a1", [1]), ("a2", [2])):
        core.add(make_request([*SHARED, *tail], name, **long))
    for name in ("b", "c"):
        core.add(make_request([7, 8, ord(name) % 50], name, **long))
    run(core, [])
    assert [names(p) for p in plans[:3]] == [["a1", "b"], ["a1", "a2", "b"], ["a1", "a2", "b"]]


def test_one_that_waits_for_a_request_that_is_aborted_goes_on_by_itself() -> None:
    core = make_core(Setup(token_budget=9, is_async=True))
    plans = record(core)
    for name in ("first", "second"):
        core.add(make_request([*SHARED, 1], name, max_tokens=1))
    core.step()
    core.abort("first")
    run(core, [])
    assert names(plans[1]) == ["second"]
    assert plans[1].start[0] == 8, "the blocks of the aborted request are right and still there"


# ---------------------------------------------------------------- what may be found
def test_a_preempted_rows_blocks_of_the_step_that_was_being_planned_are_not_found() -> None:
    setup = Setup(num_blocks=9, num_rows=2, token_budget=12, policy="priority")
    core = make_core(setup)
    low = make_request(SHARED, "low", 1, max_tokens=2)
    core.add(low)
    first = plan_step(core)
    assert first.query_len.tolist() == [12]
    high = make_request(range(40, 58), "high", 0, max_tokens=2)
    core.add(high)
    second = plan_step(core)  # low's next chunk is chosen, then high takes its blocks
    assert names(second) == ["high"]
    pool = core.scheduler.kv.pools[0]
    found = [pool.find((0, own)) is not None for own in low.sequences[0].hashes[4]]
    assert found[3:] == [False, False], "blocks were found that no step computes"


def test_what_an_aborted_request_had_computed_is_found_before_the_step_comes_back() -> None:
    core = make_core(Setup())
    core.add(make_request([*SHARED, 1], "gone"))
    plan_step(core)
    core.abort("gone")
    assert cached(core, [*SHARED, 2]) == 20


def test_blocks_handed_to_another_row_are_not_found_any_more() -> None:
    core = make_core(Setup(num_blocks=8))  # seven usable
    core.add(make_request([*SHARED, 1], "gone", max_tokens=1))
    plan_step(core)
    core.abort("gone")
    core.add(make_request(range(40, 62), "other", max_tokens=1))
    assert names(plan_step(core)) == ["other"]
    core.abort("other")
    assert cached(core, [*SHARED, 2]) == 4  # six taken: its last, then its end; its start is left


@pytest.mark.parametrize("ends_first", [False, True])
def test_nan_leaves_no_block_to_find_even_when_its_request_ended_before(ends_first: bool) -> None:
    core = make_core(Setup())
    core.add(make_request([*SHARED, 1], "bad"))
    plan = plan_step(core)
    if ends_first:
        core.abort("bad")
    fetch(core, plan, "bad")
    assert cached(core, [*SHARED, 2]) == 0


@pytest.mark.parametrize("is_preempted", [False, True])
def test_nan_in_a_shared_block_costs_those_who_shared_it_time_but_no_token(
    is_preempted: bool,
) -> None:
    core = make_core(Setup())
    bad, good = (make_request([*SHARED, i], f"{i}", max_tokens=3) for i in (1, 2))
    core.add(bad)
    core.add(good)
    first, second, third = plans = [plan_step(core) for _ in range(3)]
    assert [names(p) for p in plans] == [["1"], ["1", "2"], ["1", "2"]]
    assert fetch(core, first, "1") == [] and bad.sequences[0].finish_reason == "error"
    if is_preempted:
        core.scheduler._preempt(good.sequences[0].row)
    assert fetch(core, second, "1", "2") == []
    again = plan_step(core)
    assert names(again) == ["2"] and again.start[0] == 0
    assert fetch(core, third, "1", "2") == [], "what was drawn after NaN is no token either"
    assert fetch(core, again) == [("2", 1)]
    for expected in ([("2", 1)], [("2", 1)]):
        plan = plan_step(core)
        assert fetch(core, plan) == expected
    assert good.sequences[0].finish_reason == "length"
    check_empty(core.scheduler)


def test_the_second_try_shares_nothing_even_if_there_is_something_again() -> None:
    """Else a request with NaN of its own could be tried for ever."""
    core = make_core(Setup(policy="priority"))
    core.add(make_request([*SHARED, 1], "first", 1, max_tokens=1))
    fetch(core, plan_step(core))
    core.add(make_request([*SHARED, 2], "own", 1, max_tokens=1))
    fetch(core, plan_step(core), "own")
    core.add(make_request([*SHARED, 3], "other", 0, max_tokens=1))
    plan = plan_step(core)
    assert names(plan) == ["other", "own"] and plan.start.tolist() == [0, 0]


def test_a_draw_from_nan_is_not_taken_for_one_of_the_second_try() -> None:
    """The second try is preempted while steps of both are in flight."""
    core = make_core(Setup())
    core.add(make_request([*SHARED, 1], "first", max_tokens=1))
    fetch(core, plan_step(core))
    request = make_request([*SHARED, 2], "r", max_tokens=4)
    core.add(request)
    plans = [plan_step(core) for _ in range(2)]
    assert fetch(core, plans[0], "r") == []
    again = plan_step(core)
    core.scheduler._preempt(request.sequences[0].row)
    assert fetch(core, plans[1]) == []
    assert fetch(core, again) == [("r", 1)]


def test_what_was_drawn_from_nan_gives_no_block_its_name() -> None:
    """The draw would complete a block, whose KV the step ahead computes."""
    core = make_core(Setup())
    core.add(make_request(SHARED[:7], "first", max_tokens=1))
    fetch(core, plan_step(core))
    request = make_request(SHARED[:7], "r", max_tokens=4)
    core.add(request)
    plans = [plan_step(core) for _ in range(2)]
    assert plans[0].start[0] == 4 and fetch(core, plans[0], "r") == []
    again = plan_step(core)
    assert fetch(core, plans[1], "r") == [] and again.query_len.tolist() == [7]
    assert len(request.sequences[0].hashes[4]) == 1


def test_nan_that_is_a_requests_own_ends_it_at_the_second_try() -> None:
    core = make_core(Setup())
    core.add(make_request([*SHARED, 1], "first", max_tokens=1))
    plan = plan_step(core)
    fetch(core, plan)
    request = make_request([*SHARED, 2], "own", max_tokens=1)
    core.add(request)
    for start in (20, 0):
        assert request.sequences[0].finish_reason is None
        plan = plan_step(core)
        assert plan.start.tolist() == [start]
        fetch(core, plan, "own")
    assert request.sequences[0].finish_reason == "error"


def test_a_device_that_failed_leaves_no_block_to_find() -> None:
    core = make_core(Setup())
    core.add(make_request([*SHARED, 1], "r"))
    plan_step(core)
    core.scheduler.restart()
    core.abort("r")
    assert cached(core, [*SHARED, 2]) == 0


def test_a_block_with_a_token_that_is_not_fetched_is_not_found() -> None:
    """Of an answer, as much is found as the host has seen."""
    core = make_core(Setup())
    request = make_request(SHARED[:6], "r", temperature=0, max_tokens=12, ignore_eos=True)
    core.add(request)
    # Computes tokens 0 to 7, of which 6 and 7 are drawn and not fetched.
    plans = [plan_step(core) for _ in range(3)]
    assert len(core.scheduler.kv.pools[0].key_of) == 1
    fetch(core, plans[0])
    fetch(core, plans[1])
    plan_step(core)
    assert len(core.scheduler.kv.pools[0].key_of) == 2
    assert cached(core, [*SHARED[:6], 1, 1, 9]) == 8


def test_an_answers_last_full_block_is_found_after_its_end() -> None:
    """Its tokens are known when no further step of the row is planned."""
    core = make_core(Setup())
    core.add(make_request(SHARED[:6], "r", max_tokens=3, ignore_eos=True))
    for plan in [plan_step(core) for _ in range(3)]:
        fetch(core, plan)
    assert not core.scheduler.requests
    assert cached(core, [*SHARED[:6], 1, 1, 9]) == 8


def test_samples_of_one_prompt_start_one_step_after_it() -> None:
    core = make_core(Setup(is_async=True))
    plans = record(core)
    request = make_request([*SHARED, 1], n=4, temperature=1.0, max_tokens=3, ignore_eos=True)
    run(core, [request])
    assert [len(p.rows) for p in plans[:2]] == [1, 4]
    assert [s.num_hit_tokens for s in request.sequences] == [0, 20, 20, 20]


def test_blocks_that_left_a_window_are_found_while_nobody_took_them() -> None:
    """A prompt in two chunks: what the first wrote has left the window before it is fetched."""
    setup = Setup(windows=(6, 6), token_budget=12, is_async=True)
    core = make_core(setup)
    watch(core)
    requests = [make_request([*SHARED[:12], i], f"r{i}", temperature=0) for i in range(2)]
    core.add(make_request([*SHARED, 1], "long", temperature=0))
    for _ in range(3):
        core.step()
    streams = run(core, requests)
    assert [r.sequences[0].num_hit_tokens for r in requests] == [12, 12]
    for request in requests:
        assert streams[request.request_id, 0].tokens == run_alone(setup, request).tokens


@pytest.mark.parametrize("num_blocks", [9, 12, 40])
def test_sharers_in_a_small_cache_get_their_tokens_through_preemption(num_blocks: int) -> None:
    setup = Setup(num_blocks=num_blocks, num_rows=4, token_budget=16, is_async=True)
    core = make_core(replace(setup, windows=FULL))
    watch(core)
    requests = [
        make_request([*SHARED[:15], i], f"r{i}", temperature=0, max_tokens=14, ignore_eos=True)
        for i in range(5)
    ]
    streams = run(core, requests)
    for request in requests:
        assert streams[request.request_id, 0].tokens == run_alone(setup, request).tokens
    check_empty(core.scheduler)


# ---------------------------------------------------------------- a chosen row makes room
@pytest.mark.parametrize(("length", "chunk"), [(18, 8), (1, 1)])
def test_whoever_preempts_a_row_that_was_chosen_runs_in_its_place(length: int, chunk: int) -> None:
    """With its tokens of the step's budget, and whatever kind of step it chose."""
    constraints = StepConstraints(mixed_ok=False, chunk_multiple=4)
    setup = Setup(num_blocks=6, num_rows=2, token_budget=10, policy="priority")
    core = make_core(replace(setup, constraints=constraints))
    core.add(make_request(SHARED[:17], "low", 1, max_tokens=2))
    assert names(plan_step(core)) == ["low"]
    core.add(make_request(range(40, 40 + length), "high", 0, max_tokens=2))
    plan = plan_step(core)
    assert names(plan) == ["high"] and plan.query_len.tolist() == [chunk]
