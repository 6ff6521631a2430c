"""However requests are batched, chunked, preempted and shared, each gets its tokens of alone."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_core.engine.request import Request
from vllm_core.tests.engine import mixes
from vllm_core.tests.engine.tiny import (
    Setup,
    Stream,
    Streams,
    make_core,
    run,
    run_alone,
)
from vllm_core.tests.engine.watch import check_empty, watch

_ALONE: dict[object, Stream] = {}
"""Streams of sequences alone: the same in every engine, so each is computed once."""


def expected(setup: Setup, request: Request, index: int) -> Stream:
    key = (setup.windows, tuple(request.prompt), repr(request.params), index)
    if key not in _ALONE:
        _ALONE[key] = run_alone(setup, request, index)
    return _ALONE[key]


def check_equal(setup: Setup, requests: list[Request], streams: Streams) -> None:
    for request in requests:
        for sequence in request.sequences:
            stream = streams.get((request.request_id, sequence.index), Stream())
            own = expected(setup, request, sequence.index)
            where = (request.request_id, sequence.index)
            assert stream.tokens == own.tokens, where
            assert sequence.finish_reason in ("stop", "length"), sequence.error
            assert len(stream.logprobs) == len(own.logprobs)
            for mine, theirs in zip(stream.logprobs, own.logprobs, strict=True):
                assert mine.ids.tolist() == theirs.ids.tolist()
                np.testing.assert_allclose(mine.values, theirs.values, atol=1e-6)
                assert mine.rank == theirs.rank
            wanted = request.params.prompt_logprobs is not None and sequence.index == 0
            assert len(stream.prompt_scores) == (len(request.prompt) - 1 if wanted else 0)
            if wanted:
                for (ids, values, rank), (ids2, values2, rank2) in zip(
                    stream.prompt_scores, own.prompt_scores, strict=True
                ):
                    assert ids.tolist() == ids2.tolist() and rank == rank2
                    np.testing.assert_allclose(values, values2, atol=1e-6)


@settings(
    max_examples=120, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(mixes.setups(), mixes.requests(), st.integers(0, 12))
def test_every_sequence_of_a_mix_gets_the_tokens_it_gets_alone(
    setup: Setup, requests: list[Request], when: int
) -> None:
    core = make_core(setup)
    seen = watch(core)
    half = len(requests) // 2
    streams = run(core, requests[:half], late={when: requests[half:]})
    check_equal(setup, requests, streams)
    check_empty(core.scheduler)
    assert seen.num_plans == core.scheduler.stats.num_steps
