"""The loop: samples of one prompt, log-probabilities, faults, capacity, aborts, pauses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import Executable, Program, StepConstraints, StepLayout
from vllm_core.engine.core import MAX_FAILURES, EngineCore
from vllm_core.engine.request import Request
from vllm_core.errors import CapacityError, InvalidArgument
from vllm_core.ops import BucketKey
from vllm_core.runner import batch
from vllm_core.tests.engine.tiny import (
    FULL,
    MAX_LEN,
    TWO_GROUPS,
    VOCAB,
    Constrained,
    Setup,
    Stream,
    log_softmax,
    make_core,
    make_request,
    oracle_logits,
    run,
    run_alone,
    take,
    weights_of,
)
from vllm_core.tests.engine.watch import check_empty, watch

LONG = list(range(10, 31))


def tokens_alone(setup: Setup, request: Request, index: int = 0) -> list[int]:
    return run_alone(setup, request, index).tokens


# ---------------------------------------------------------------- several samples of one prompt
@pytest.mark.parametrize("caching", [True, False])
def test_samples_differ_and_each_is_the_one_drawn_alone_with_its_index(caching: bool) -> None:
    setup = Setup(enable_prefix_caching=caching, is_async=True)
    core = make_core(setup)
    watch(core)
    request = make_request(LONG, n=4, temperature=1.0, seed=11, max_tokens=8)
    streams = run(core, [request])
    drawn = [streams["r", index].tokens for index in range(4)]
    assert len(set(map(tuple, drawn))) == 4
    assert drawn == [tokens_alone(setup, request, index) for index in range(4)]
    shared = (len(LONG) - 1) // setup.block_tokens * setup.block_tokens
    assert core.stats()["prefix_hit_tokens"] == 3 * shared
    assert [s.num_hit_tokens for s in request.sequences] == [0, shared, shared, shared]
    check_empty(core.scheduler)


def test_without_prefix_caching_requests_share_nothing() -> None:
    core = make_core(Setup(enable_prefix_caching=False))
    for name in "ab":
        request = make_request(LONG, name, n=2, seed=0)
        run(core, [request])
        assert [s.num_hit_tokens for s in request.sequences] == [0, 20]
    run(core, [make_request(LONG, "c")])
    assert core.stats()["prefix_hit_tokens"] == 2 * 20


def test_a_salt_keeps_the_prompts_of_two_clients_apart() -> None:
    core = make_core(Setup())
    for salt, hits in ((b"a", 0), (b"b", 0), (b"a", 20)):
        request = make_request(LONG)
        request.salt = salt
        run(core, [request])
        assert request.sequences[0].num_hit_tokens == hits


# ---------------------------------------------------------------- log-probabilities by hand
@pytest.mark.parametrize("windows", [FULL, TWO_GROUPS])
@pytest.mark.parametrize("is_async", [False, True])
def test_logprobs_of_prompt_and_output_equal_those_of_a_dense_forward_pass(
    windows: tuple[int | None, ...], is_async: bool
) -> None:
    """Chunks of 5 tokens, a cache that forces preemption, and cached prefixes."""
    num_blocks = 20 if windows == FULL else 28
    setup = Setup(windows=windows, num_blocks=num_blocks, token_budget=5, is_async=is_async)
    core = make_core(setup)
    watch(core)
    requests = [
        make_request(
            LONG[: 21 - i], f"r{i}", max_tokens=16, temperature=0, logprobs=i, prompt_logprobs=3 - i
        )
        for i in range(4)
    ]
    cached = make_request(LONG, "cached", max_tokens=2, temperature=0)
    streams = run(core, requests, late={12: [cached]})
    assert core.stats()["prefix_hit_tokens"] > 0 and core.stats()["preemptions"] > 0
    for request in requests:
        stream = streams[request.request_id, 0]
        whole = request.prompt + stream.tokens
        expected = log_softmax(oracle_logits(weights_of(setup), windows, whole))
        assert len(stream.prompt_scores) == len(request.prompt) - 1
        assert len(stream.logprobs) == len(stream.tokens)
        rows = stream.prompt_scores + [(p.ids, p.values, int(p.rank)) for p in stream.logprobs]
        counts = [request.params.prompt_logprobs] * len(stream.prompt_scores)
        counts += [request.params.logprobs] * len(stream.tokens)
        for place, ((ids, values, rank), count) in enumerate(zip(rows, counts, strict=True), 1):
            own = expected[place - 1]
            best = np.argsort(-own, kind="stable")[:count]
            assert ids.tolist() == [whole[place], *best.tolist()]
            np.testing.assert_allclose(values, own[ids], atol=1e-5)
            assert rank == 1 + (own > own[whole[place]]).sum()


def test_a_request_gets_as_many_alternatives_as_it_asked_for_beside_one_that_wants_more() -> None:
    core = make_core(Setup())
    requests = [make_request([5, i], f"r{i}", logprobs=i, temperature=0) for i in (0, 2, 5)]
    streams = run(core, requests)
    for i in (0, 2, 5):
        assert all(p.ids.shape == (1 + i,) for p in streams[f"r{i}", 0].logprobs)


# ---------------------------------------------------------------- rows that fail
def poisoned_weights(setup: Setup, token: int) -> dict[str, Any]:
    weights = weights_of(setup)
    embed = weights["embed"].copy()
    embed[token] = np.nan
    return weights | {"embed": embed}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_row_with_nan_logits_fails_alone(is_async: bool) -> None:
    setup = Setup(is_async=is_async)
    core = make_core(setup, weights=poisoned_weights(setup, 66))
    watch(core)
    ban: dict[str, Any] = {"banned_token_ids": (66,), "max_tokens": 8, "temperature": 0}
    good = [make_request(LONG[:n], f"g{n}", **ban) for n in (3, 9, 20)]
    bad = make_request([*LONG[:9], 66, *LONG], "bad", **ban, n=1)
    twins = make_request([66, 5, 6, 7, 8], "twins", n=2, temperature=1.0)
    streams = run(core, [*good[:1], bad, *good[1:], twins])
    for request in (bad, twins):
        for sequence in request.sequences:
            assert sequence.finish_reason == "error" and "finite" in str(sequence.error)
            assert streams[request.request_id, sequence.index].tokens == []
    for request in good:
        assert request.sequences[0].finish_reason == "length"
        assert streams[request.request_id, 0].tokens == tokens_alone(setup, request)
    again = [make_request(r.prompt, f"again{r.request_id}", **ban) for r in (good[1], bad)]
    streams = run(core, again)
    assert streams["againg9", 0].tokens == tokens_alone(setup, good[1]), "blocks with NaN are found"
    assert again[1].sequences[0].finish_reason == "error"
    check_empty(core.scheduler)


@pytest.mark.parametrize("windows", [FULL, TWO_GROUPS])
def test_nan_in_a_first_chunk_leaves_no_block_to_share(windows: tuple[int | None, ...]) -> None:
    """Not even blocks that had left a window when the fault was seen."""
    setup = Setup(windows=windows, token_budget=8)
    core = make_core(setup, weights=poisoned_weights(setup, 66))
    prompt = [66, *range(20)]
    run(core, [make_request(prompt)])
    assert core.stats()["kv_blocks_cached"] == 0


# ---------------------------------------------------------------- programs that fail
class Faulty(Constrained):
    """Raises in the steps of these numbers, once each; or always."""

    def __init__(self, steps: set[int], always: bool = False) -> None:
        super().__init__(StepConstraints())
        self.steps, self.always, self.num_steps = steps, always, 0

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)

        def run_or_fail(*args: Any) -> tuple[Any, ...]:
            if program.name == "step":
                self.num_steps += 1
                if self.always or self.num_steps in self.steps:
                    raise RuntimeError("the device is unwell")
            return run(*args)

        return run_or_fail


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("steps", [{1}, {2}, {4}, {9}, {3, 4}, {2, 6, 11}])
def test_a_program_that_fails_costs_time_but_no_token(steps: set[int], is_async: bool) -> None:
    setup = Setup(is_async=is_async, token_budget=16)
    core = make_core(setup, Faulty(steps))
    watch_after_restart(core)
    requests = [
        make_request(LONG, "a", temperature=1.0, seed=3, n=2, max_tokens=9, logprobs=1),
        make_request(LONG[:7], "b", temperature=0, prompt_logprobs=1, presence_penalty=1.0),
        make_request(LONG[:12], "c", temperature=0, logit_bias={4: 5.0}, max_tokens=12),
    ]
    streams = run(core, requests)
    for request in requests:
        for sequence in request.sequences:
            stream = streams[request.request_id, sequence.index]
            assert stream.tokens == tokens_alone(setup, request, sequence.index)
    assert len(streams["b", 0].prompt_scores) == 6
    check_empty(core.scheduler)


def watch_after_restart(core: EngineCore) -> None:
    """The watch keeps what the device has, so it forgets it when the device does."""
    seen, reset = watch(core), core.runner.reset

    def reset_both() -> None:
        reset()
        seen.forget()

    core.runner.reset = reset_both  # type: ignore[method-assign]


def test_a_program_that_always_fails_ends_in_its_error_after_three_tries() -> None:
    runtime = Faulty(set(), always=True)
    core = make_core(Setup(), runtime)
    core.add(make_request(LONG))
    with pytest.raises(RuntimeError, match="unwell"):
        for _ in range(10):
            core.step()
    assert runtime.num_steps == MAX_FAILURES == 3


def test_the_sample_that_may_draw_is_never_the_one_preempted() -> None:
    """One draw per step: were the one that draws preempted, the step would be empty."""
    setup = Setup(block_tokens=4, num_rows=3, max_draws=1, constraints=StepConstraints(False))
    for num_blocks in range(8, 15):
        core = make_core(replace(setup, num_blocks=num_blocks))
        watch(core)
        request = make_request(
            [5, 6, 7], n=3, temperature=1.0, seed=1, max_tokens=22, ignore_eos=True
        )
        streams = run(core, [request])
        assert [len(streams["r", i].tokens) for i in range(3)] == [22] * 3


# ---------------------------------------------------------------- what is refused
def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers() -> None:
    core = make_core(Setup())
    with pytest.raises(CapacityError, match=rf"{MAX_LEN} tokens.*{MAX_LEN}"):
        core.add(make_request([1] * MAX_LEN))
    core.add(make_request([1] * (MAX_LEN - 1)))
    streams = run(core, [])
    assert len(streams["r", 0].tokens) == 1


def test_a_request_that_the_cache_can_never_hold_is_refused() -> None:
    core = make_core(Setup(num_blocks=6))  # five of them usable: 20 tokens
    core.add(make_request([1] * 14, "fits", max_tokens=6, ignore_eos=True))
    with pytest.raises(CapacityError, match=r"21 tokens needs 6 KV blocks.*has 5"):
        core.add(make_request([1] * 15, "not", max_tokens=6))
    assert len(run(core, [])["fits", 0].tokens) == 6
    check_empty(core.scheduler)


def test_an_id_that_runs_already_is_refused_and_may_be_used_again_later() -> None:
    core = make_core(Setup())
    core.add(make_request([1, 2]))
    with pytest.raises(InvalidArgument, match="'r' is running already"):
        core.add(make_request([3]))
    run(core, [])
    run(core, [make_request([3])])


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"banned_token_ids": (VOCAB,)},
        {"allowed_token_ids": (VOCAB,)},
        {"stop_token_ids": (VOCAB,)},
    ],
)
def test_token_ids_that_do_not_exist_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"{VOCAB} does not exist"):
        make_request([1], **params)


def test_min_tokens_with_nothing_but_ends_to_draw_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="allow another token"):
        make_request([1], min_tokens=2, allowed_token_ids=(5,), stop_token_ids=(5,))
    with pytest.raises(InvalidArgument, match="allow another token"):
        make_request(
            [1], min_tokens=2, allowed_token_ids=(5, 6), banned_token_ids=(6,), stop_token_ids=(5,)
        )


def test_banning_every_token_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="leaves no token"):
        make_request([1], banned_token_ids=tuple(range(VOCAB)))


def test_a_priority_that_is_no_number_is_refused() -> None:
    for priority in (0.5, 2**21):
        with pytest.raises(InvalidArgument, match="priority must be a whole number"):
            make_request([1], "r", priority)  # type: ignore[arg-type]


def test_min_tokens_beyond_every_counter_fills_the_context() -> None:
    request = make_request([1, 2], min_tokens=10**30, max_tokens=None, stop_token_ids=(5,))
    streams = run(make_core(Setup()), [request])
    assert len(streams["r", 0].tokens) == MAX_LEN - 2


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_prompt_ids_that_do_not_exist_are_refused(token: int) -> None:
    with pytest.raises(InvalidArgument, match="does not exist"):
        make_request([1, token])


def test_a_step_that_cannot_hold_a_chunk_is_refused_at_the_start() -> None:
    constraints = StepConstraints(chunk_multiple=16)
    with pytest.raises(InvalidArgument, match="multiples of 16"):
        make_core(Setup(token_budget=8, constraints=constraints))


# ---------------------------------------------------------------- aborts
@pytest.mark.parametrize("is_async", [False, True])
def test_an_abort_at_any_step_frees_everything_and_leaves_the_others_alone(is_async: bool) -> None:
    setup = Setup(is_async=is_async, token_budget=8, num_blocks=18)
    for when in range(14):
        core = make_core(setup)
        watch(core)
        victim = make_request(LONG, "victim", n=2, temperature=1.0, max_tokens=16, seed=1)
        others = [make_request(LONG[:n], f"r{n}", temperature=0) for n in (4, 17)]

        def abort(step: int, core: EngineCore = core, when: int = when) -> None:
            if step == when:
                core.abort("victim")
                core.abort("nobody")

        streams = run(core, [others[0], victim, others[1]], each_step=abort)
        for request in others:
            assert streams[request.request_id, 0].tokens == tokens_alone(setup, request)
        reasons = {s.finish_reason for s in victim.sequences}
        assert reasons <= {"abort", "length", "stop"} and reasons
        check_empty(core.scheduler)


def test_closing_ends_what_runs() -> None:
    core = make_core(Setup(is_async=True))
    request = make_request(LONG)
    core.add(request)
    core.step()
    core.close()
    assert request.sequences[0].finish_reason == "abort"


# ---------------------------------------------------------------- ends
def greedy_answer(**params: Any) -> tuple[Request, Stream]:
    request = make_request(LONG, temperature=0, **params)
    return request, run(make_core(Setup(is_async=True)), [request])["r", 0]


def test_a_stop_id_ends_the_answer_and_is_named_an_end_of_sequence_is_not() -> None:
    _, whole = greedy_answer(max_tokens=12)
    place = 5
    stop = whole.tokens[place]
    first = whole.tokens.index(stop)
    request, cut = greedy_answer(max_tokens=12, stop_token_ids=(stop,))
    assert cut.tokens == whole.tokens[: first + 1]
    assert (request.sequences[0].finish_reason, request.sequences[0].stop_reason) == ("stop", stop)

    request = make_request(LONG, temperature=0, max_tokens=12)
    request = replace(request, eos_token_ids=(stop,))
    streams = run(make_core(Setup()), [request])
    assert streams["r", 0].tokens == cut.tokens
    assert (request.sequences[0].finish_reason, request.sequences[0].stop_reason) == ("stop", None)

    request = make_request(LONG, temperature=0, max_tokens=12, ignore_eos=True)
    request = replace(request, eos_token_ids=(stop,))
    assert run(make_core(Setup()), [request])["r", 0].tokens == whole.tokens


def test_min_tokens_holds_stop_ids_back_so_that_they_are_not_even_drawn() -> None:
    _, whole = greedy_answer(max_tokens=12)
    stop = whole.tokens[0]
    _, cut = greedy_answer(max_tokens=12, min_tokens=4, stop_token_ids=(stop,))
    assert stop not in cut.tokens[:4] and len(cut.tokens) >= 4


def test_without_max_tokens_an_answer_fills_the_context() -> None:
    request, stream = greedy_answer(max_tokens=None, ignore_eos=True)
    assert len(LONG) + len(stream.tokens) == MAX_LEN
    assert request.sequences[0].finish_reason == "length"


# ---------------------------------------------------------------- changes that do not fit a step
@pytest.mark.parametrize("num_changes", [1, 2])
def test_changes_beyond_a_steps_buffer_go_ahead_through_apply(
    num_changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached prefix sets more table cells and history tokens than a small step has room for."""
    monkeypatch.setattr(StepLayout, "num_changes", num_changes)
    monkeypatch.setattr(batch, "APPLY_ROWS", 3)
    calls = []
    overflow = batch.overflow

    def counted(*args: Any) -> Any:
        found = list(overflow(*args))
        calls.append(len(found))
        return iter(found)

    monkeypatch.setattr("vllm_core.runner.runner.overflow", counted)
    setup = Setup(block_tokens=2, windows=TWO_GROUPS)
    core = make_core(setup)
    watch(core)
    requests = [
        make_request([*LONG, i], f"r{i}", temperature=0, repetition_penalty=1.4) for i in range(3)
    ]
    streams = run(core, requests[:1])
    streams |= run(core, requests[1:])
    assert core.stats()["prefix_hit_tokens"] > 0 and max(calls) > 2
    for request in requests:
        assert streams[request.request_id, 0].tokens == tokens_alone(setup, request)


# ---------------------------------------------------------------- slow readers
def test_a_paused_request_runs_in_no_step_even_after_it_lost_its_blocks() -> None:
    setup = Setup(num_blocks=9, num_rows=2)  # eight usable: 32 tokens, one of the two at a time
    core = make_core(setup)
    watch(core)
    slow = make_request(LONG[:12], "slow", temperature=0, max_tokens=14, ignore_eos=True)
    other = make_request(LONG[3:18], "other", temperature=0, max_tokens=12, ignore_eos=True)
    streams: dict[tuple[str, int], Stream] = {}
    core.add(slow)
    for _ in range(3):
        take(streams, core.step())
    core.scheduler.pause("slow", True)
    known = len(streams["slow", 0].tokens)
    core.add(other)
    while not other.is_finished:
        assert not core.is_stalled
        take(streams, core.step())
    for _ in range(3):
        assert core.step() == [] and core.is_stalled
    assert len(streams["slow", 0].tokens) == known and slow.sequences[0].num_preemptions == 1
    core.scheduler.pause("slow", False)
    while core.has_work:
        take(streams, core.step())
    for request in (slow, other):
        assert streams[request.request_id, 0].tokens == tokens_alone(setup, request)
    check_empty(core.scheduler)


def test_an_aborted_paused_request_is_forgotten() -> None:
    core = make_core(Setup())
    request = make_request(LONG)
    core.add(request)
    core.scheduler.pause("r", True)
    assert core.step() == [] and core.has_work
    core.abort("r")
    assert not core.has_work and not core.scheduler.waiting.waiting()


def test_a_row_that_is_admitted_without_room_for_a_chunk_keeps_its_parameters_for_later() -> None:
    """It has a row, but no token in the step whose buffer has room for one reset per row."""
    setup = Setup(token_budget=5, constraints=StepConstraints(chunk_multiple=4))
    core = make_core(setup)
    watch(core)
    requests = [
        make_request(LONG[:3], "a", temperature=0),
        make_request(LONG[:10], "b", temperature=0, repetition_penalty=1.5),
    ]
    streams = run(core, requests)
    for request in requests:
        assert streams[request.request_id, 0].tokens == tokens_alone(setup, request)
