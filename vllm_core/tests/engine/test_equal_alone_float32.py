"""The same on torch and JAX in float32, where another shape may sum in another order: rule T8.

Greedy tokens equal those drawn alone while the best two logits are more than 0.05 apart. From the
first thinner position on, log-probabilities are compared under teacher forcing. Under 90 % decided
strictly is a failure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from vllm_core.backend import BucketPolicy, Runtime
from vllm_core.engine.core import EngineCore
from vllm_core.engine.request import Request
from vllm_core.ops import Features
from vllm_core.tests.engine import mixes
from vllm_core.tests.engine.tiny import (
    MAX_LEN,
    TWO_GROUPS,
    TWO_POOLS,
    Setup,
    Stream,
    alone,
    make_core,
    make_request,
    run,
)
from vllm_core.tests.engine.watch import check_empty, watch

MARGIN = 0.05
TOLERANCE = 2e-3
SHARPNESS = 4.0
"""Spreads the logits, so that few margins are thin."""

mix = mixes.requests(num_alternatives=2)
fixed = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Count:
    """Positions by how they were decided."""

    strict: int = 0
    forced: int = 0
    sampled: int = 0
    """Drawn tokens, and those with penalties or bias: equal without regard to margins."""

    def report(self, name: str, record_property: Any) -> None:
        total = self.strict + self.forced
        print(f"{name}: {self.strict} strict, {self.forced} forced, {self.sampled} sampled equal")
        for what, value in vars(self).items():
            record_property(what, value)
        assert total > 300 and self.strict >= 0.9 * total


class Comparison:
    """Engines for a mix and for one sequence alone, on the same parameters."""

    def __init__(self, single: EngineCore) -> None:
        self.single, self.count = single, Count()

    def check(self, requests: list[Request], core: EngineCore) -> None:
        streams = run(core, requests)
        check_empty(core.scheduler)
        for request in requests:
            for sequence in request.sequences:
                key = (request.request_id, sequence.index)
                self._compare(request, sequence.index, streams[key])

    def _compare(self, request: Request, index: int, mine: Stream) -> None:
        twin = alone(request, index)
        own = run(self.single, [twin])[twin.request_id, index]
        if not is_plain(request):
            assert mine.tokens == own.tokens
            self.count.sampled += len(own.tokens)
            return
        margins = [p.values[1] - p.values[2] for p in own.logprobs]
        thin = next((i for i, m in enumerate(margins) if m <= MARGIN), len(margins))
        assert mine.tokens[:thin] == own.tokens[:thin]
        self.count.strict += thin
        if thin == len(margins):
            assert mine.tokens == own.tokens
        else:
            self.count.forced += len(mine.tokens) - thin
        self._check_forced(request, mine)

    def _check_forced(self, request: Request, mine: Stream) -> None:
        """What the mix reported for its tokens, against one pass over them alone."""
        whole = [*request.prompt, *mine.tokens]
        twin = make_request(whole, "forced", max_tokens=1, temperature=0, prompt_logprobs=2)
        scores = run(self.single, [twin])["forced", 0].prompt_scores[len(request.prompt) - 1 :]
        for reported, (ids, values, _) in zip(mine.logprobs, scores, strict=True):
            assert reported.ids[0] == ids[0]
            np.testing.assert_allclose(reported.values, values, atol=TOLERANCE)


def is_plain(request: Request) -> bool:
    p = request.params
    return p.is_greedy and not (p.needs_history or p.needs_bias or p.min_tokens)


def single_of(setup: Setup) -> Setup:
    return replace(
        setup,
        block_tokens=16,
        num_blocks=20,
        num_rows=1,
        token_budget=MAX_LEN,
        enable_prefix_caching=False,
        is_async=False,
        max_draws=None,
        num_slots=None,
    )


def test_on_torch(record_property: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is missing: T8 on torch was not checked")
    from vllm_core.bindings.torch import TorchRuntime

    runtime = TorchRuntime(torch.device("cpu"), "float32", 1)
    comparisons: dict[tuple[int | None, ...], Comparison] = {}

    @settings(fixed, max_examples=40)
    @given(mixes.setups(constrained=False), mix)
    def check(setup: Setup, requests: list[Request]) -> None:
        setup = replace(setup, sharpness=SHARPNESS)
        if setup.windows not in comparisons:
            single = make_core(single_of(setup), runtime)
            comparisons[setup.windows] = Comparison(single)
        core = make_core(setup, runtime)
        watch(core)
        comparisons[setup.windows].check(requests, core)

    check()
    total = Count()
    for comparison in comparisons.values():
        for what, value in vars(comparison.count).items():
            setattr(total, what, getattr(total, what) + value)
    total.report("torch", record_property)
    runtime.close()


@pytest.mark.parametrize("windows", [TWO_GROUPS, TWO_POOLS])
def test_on_jax(
    windows: tuple[int | None, ...],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    """One engine for all mixes, with two shapes: what differs is who is in a step, and when."""
    pytest.importorskip("jax", reason="jax is missing: T8 on JAX was not checked")
    from vllm_core.backend import OpenConfig
    from vllm_core.bindings.jax import open_runtime

    runtime: Runtime = open_runtime(OpenConfig(dtype="float32", options={"platform": "cpu"}))
    setup = Setup(
        windows=windows,
        block_tokens=4,
        num_blocks=24 if windows == TWO_GROUPS else 13,
        num_rows=4,
        token_budget=16,
        is_async=True,
        sharpness=SHARPNESS,
    )
    everything = Features(True, True, True, True, 2, True)
    two_shapes = BucketPolicy(tokens=(4, 16), rows=(4,), widths=(13,), features=(everything,))
    monkeypatch.setattr(runtime, "buckets", lambda *largest: two_shapes)
    core = make_core(setup, runtime)
    limits = replace(core.scheduler.limits, num_rows=1, enable_prefix_caching=False, max_draws=1)
    comparison = Comparison(EngineCore(core.runner, limits, is_async=False))
    watch(core)

    @settings(fixed, max_examples=16)
    @given(mix)
    def check(requests: list[Request]) -> None:
        core.scheduler.kv.forget_all()  # the other engine wrote into the same cache
        comparison.check(requests, core)

    check()
    comparison.count.report(f"jax {windows}", record_property)
    assert core.runner.num_bucket_misses <= 2
    assert core.stats()["preemptions"] > 0 and core.stats()["prefix_hit_tokens"] > 0
