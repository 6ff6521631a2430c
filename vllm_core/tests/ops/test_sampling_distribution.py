"""Draws have the distribution that was asked for, and streams that look independent."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_core.ops import Column, Features, HostArray
from vllm_core.tests.ops.frameworks import open_binding
from vllm_core.tests.ops.sampling_oracle import Row, pack

QUANTILE = 4.7534
"""Of the normal distribution, for a test that errs once in a million."""
LOGITS = np.log(np.array([30, 20, 12, 10, 8, 6, 5, 4, 3, 2], np.float32))


def chi_square_limit(freedom: int) -> float:
    """Upper 1e-6 point, by Wilson and Hilferty's cube."""
    share = 2 / (9 * freedom)
    return float(freedom * (1 - share + QUANTILE * share**0.5) ** 3)


def draws(count: int, row: Row, *, vary: str) -> HostArray:
    """`count` tokens of one request with positions, sequence indices or seeds 0 .. count-1."""
    params, positions, history, bias = pack([row], len(LOGITS))
    params = np.repeat(params, count, 0)
    positions = np.repeat(positions, count)
    if vary == "position":
        positions = np.arange(count, dtype=np.int32)
    else:
        column = {"index": Column.SEQUENCE_INDEX, "seed": Column.SEED_LOW}[vary]
        params[:, column] = np.arange(count)
    ops = open_binding("numpy").ops
    logits = np.repeat(LOGITS[None], count, 0)
    features = Features(draw=True, filters=bool(row.top_k or row.min_p or row.top_p < 1))
    tokens, fault = ops.sample(logits, params, positions, history, bias, features)
    assert not fault.any()
    return np.asarray(tokens)


def chi_square(tokens: HostArray, p: HostArray) -> float:
    expected = p / p.sum() * len(tokens)
    observed = np.bincount(tokens, minlength=len(p))
    assert (observed[expected == 0] == 0).all()
    live = expected > 0
    return float((((observed - expected) ** 2)[live] / expected[live]).sum())


@pytest.mark.parametrize(
    ("row", "kept", "vary"),
    [
        (Row(seed=5), range(10), "position"),
        (Row(seed=5), range(10), "index"),
        (Row(seed=5), range(10), "seed"),
        (Row(seed=6, temperature=2.0), range(10), "position"),
        (Row(seed=7, top_k=4), range(4), "position"),
        (Row(seed=8, top_p=0.71), range(4), "index"),  # 30 + 20 + 12 = 62, + 10 = 72
        (Row(seed=9, min_p=0.25), range(5), "seed"),  # 8 / 30 stays, 6 / 30 goes
    ],
)
def test_draws_pass_a_chi_square_test_at_one_in_a_million(row: Row, kept: range, vary: str) -> None:
    p = np.exp(LOGITS.astype(np.float64) / row.temperature)
    p[len(kept) :] = 0
    tokens = draws(20_000, row, vary=vary)
    assert chi_square(tokens, p) < chi_square_limit(len(kept) - 1)


def test_the_chi_square_test_rejects_a_sampler_that_is_a_little_wrong() -> None:
    p = np.exp(LOGITS.astype(np.float64))
    tokens = draws(20_000, Row(seed=5, temperature=1.1), vary="position")
    assert chi_square(tokens, p) > chi_square_limit(9)


@pytest.mark.parametrize("vary", ["position", "index", "seed"])
def test_neighbouring_draws_are_independent(vary: str) -> None:
    tokens = draws(20_000, Row(seed=11), vary=vary)
    pairs = tokens[:-1] * 10 + tokens[1:]
    p = np.exp(LOGITS.astype(np.float64))
    assert chi_square(pairs[::2], np.outer(p, p).ravel()) < chi_square_limit(99)


def test_sequences_of_one_request_are_independent_of_each_other() -> None:
    one, two = (draws(20_000, Row(seed=3, sequence_index=i), vary="position") for i in (0, 1))
    p = np.exp(LOGITS.astype(np.float64))
    assert chi_square(one * 10 + two, np.outer(p, p).ravel()) < chi_square_limit(99)


def test_n_sequences_of_one_prompt_differ_and_repeat() -> None:
    streams = [
        draws(32, Row(seed=2**40 + 1, sequence_index=i), vary="position").tolist() for i in range(8)
    ]
    again = draws(32, Row(seed=2**40 + 1, sequence_index=5), vary="position").tolist()
    assert len({tuple(s) for s in streams}) == 8
    assert streams[5] == again


@pytest.mark.parametrize(("one", "other"), [(1, 1 + 2**32), (-1, 2**64 - 1), (0, 2**63)])
def test_both_words_of_the_seed_count(one: int, other: int) -> None:
    first, second = (draws(64, Row(seed=s), vary="position").tolist() for s in (one, other))
    assert (first == second) == ((one - other) % 2**64 == 0)
