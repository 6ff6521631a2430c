"""Log-probabilities and ranks against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from vllm_core.ops import HostArray
from vllm_core.ops.catalogue import OPS
from vllm_core.tests.ops.frameworks import BINDINGS, compiled, open_binding


@lru_cache
def reporter(binding: str, count: int) -> Callable[..., Any]:
    runtime = open_binding(binding)
    return compiled(runtime, lambda x, targets: (runtime.ops.logprobs(x, targets, count),))


def report(binding: str, logits: HostArray, targets: HostArray, count: int) -> Any:
    asarray = open_binding(binding).ops.asarray
    (found,) = reporter(binding, count)(asarray(logits), asarray(targets))
    return found


def oracle(logits: HostArray) -> tuple[HostArray, HostArray]:
    """(log-probabilities, ln sum exp) in float64."""
    x = logits.astype(np.float64)
    best = x.max(-1, keepdims=True)
    lse = np.log(np.exp(x - best).sum(-1, keepdims=True)) + best
    return x - lse, lse


def awkward(vocab: int) -> tuple[HostArray, HostArray]:
    rng = np.random.default_rng(vocab)
    x = rng.normal(size=(6, vocab)).astype(np.float32)
    x[1] *= 50
    x[2] = np.round(x[2])
    x[3] += 1e4
    x[4, rng.random(vocab) < 0.5] = -np.inf
    x[4, 0] = 1.0
    x[5] = 0
    return x, rng.integers(0, vocab, 6).astype(np.int32)


@pytest.mark.parametrize("vocab", [1, 2, 65, 5000])
@pytest.mark.parametrize("binding", BINDINGS)
def test_values_are_those_of_float64_within_the_noise(binding: str, vocab: int) -> None:
    logits, targets = awkward(vocab)
    count = min(5, vocab)
    found = report(binding, logits, targets, count)
    exact, lse = oracle(logits)
    limits = OPS["logprobs"].limits
    assert limits is not None
    assert (found.ids[:, 0] == targets).all()
    for row in range(len(logits)):
        want = exact[row, found.ids[row]]
        live = np.isfinite(want)
        assert (found.values[row][~live] == -np.inf).all()
        noise = 2.0**-24 * (1 + np.abs(logits[row, found.ids[row]]) + np.abs(lse[row]))
        z = np.abs(found.values[row][live] - want[live]) / noise[live]
        assert z.max(initial=0) <= limits.max


@pytest.mark.parametrize("binding", BINDINGS)
def test_alternatives_are_the_best_tokens_in_order(binding: str) -> None:
    logits, targets = awkward(65)
    found = report(binding, logits, targets, 5)
    for row in range(len(logits)):
        best = np.sort(logits[row])[::-1][:5]
        assert (logits[row, found.ids[row, 1:]] == best).all()
        assert len(set(found.ids[row, 1:].tolist())) == 5


@pytest.mark.parametrize("binding", BINDINGS)
def test_the_rank_counts_the_tokens_that_are_likelier_ties_share_the_best(binding: str) -> None:
    logits = np.array([[3, 5, 5, 1, 5, 0]], np.float32).repeat(6, 0)
    found = report(binding, logits, np.arange(6, dtype=np.int32), 2)
    assert np.asarray(found.rank).tolist() == [4, 1, 1, 5, 1, 6]


@pytest.mark.parametrize("binding", BINDINGS)
def test_without_alternatives_only_the_token_is_reported(binding: str) -> None:
    found = report(binding, *awkward(65), 0)
    assert found.ids.shape == found.values.shape == (6, 1)
