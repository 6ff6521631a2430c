"""The kernel that draws gives the tokens of the portable text, on every instruction set.

Knows: the portable text, rows that hurt a sampler. Does not know: how the kernel finds a token
(csrc_tests/test_sample.cpp holds it to the law itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_core.bindings.numpy import NumpyOps
from vllm_core.bindings.torch.ops import TorchOps
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import Features, HostArray
from vllm_core.ops.sampling import MAX_VOCAB
from vllm_core.tests.ops.sampling_oracle import Row, pack
from vllm_core.tests.ops.test_sampling import ALL, NUM_ROWS, awkward_logits, awkward_rows
from vllm_core_cpu.ops import CpuOps

CPU = torch.device("cpu")
Drawn = tuple[list[int], list[int]]
"""Tokens and faults."""


def draw(
    ops: CpuOps | TorchOps | NumpyOps, logits: HostArray, rows: Sequence[Row], features: Features
) -> Drawn:
    params, positions, history, bias = map(ops.asarray, pack(rows, logits.shape[1]))
    x = ops.asarray(logits)
    tokens, fault = ops.sample(x, params, positions, history, bias, features)
    return tokens.tolist(), fault.tolist()


def reference(logits: HostArray, rows: Sequence[Row], features: Features) -> Drawn:
    """As numpy and torch say, both."""
    with np.errstate(all="ignore"):
        numpys = draw(NumpyOps(), logits, rows, features)
    assert numpys == draw(TorchOps(CPU), logits, rows, features)
    return numpys


@pytest.mark.parametrize("vocab", [1, 2, 65, 300, 3000])
def test_thousands_of_draws_are_those_of_the_portable_text(ops: CpuOps, vocab: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng([vocab, seed])
        logits, rows = awkward_logits(rng, vocab), awkward_rows(rng, vocab)
        assert draw(ops, logits, rows, ALL) == reference(logits, rows, ALL), seed


@pytest.mark.parametrize("vocab", [257, 1031])
def test_every_step_of_a_long_answer_draws_the_token_of_the_portable_text(
    ops: CpuOps, vocab: int
) -> None:
    rng = np.random.default_rng(vocab)
    kinds = (
        Row(),
        Row(temperature=0.7, top_k=40, top_p=0.95),
        Row(temperature=1.5, top_p=0.9),
        Row(min_p=0.1),
        Row(temperature=0.3, top_k=3, min_p=0.02),
    )
    rows = [replace(kinds[i % 5], seed=i, position=i) for i in range(1000)]
    logits = (rng.normal(size=(1000, vocab)) * 3).astype(np.float32)
    features = Features(draw=True, filters=True)
    found = draw(ops, logits, rows, features)
    assert found == reference(logits, rows, features)
    assert len(set(found[0])) > vocab // 4


def test_a_large_vocabulary_draws_the_token_of_the_portable_text(ops: CpuOps) -> None:
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(12, 151_936)) * 4).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, 40_000:] = logits[2].max()
    logits[3, 5:] = -np.inf
    logits[4] = 0.25
    rows = [
        Row(temperature=1.3, seed=2**40 + 5),
        Row(top_k=20_000, seed=1),
        Row(top_p=0.6, seed=2),
        Row(temperature=1e4, top_p=0.9, seed=3),
        Row(top_k=100_000, top_p=0.5, seed=4),
        Row(temperature=1e3, top_p=0.97, seed=-5),  # every token within a thousandth
        Row(top_k=40, top_p=0.95, seed=6),
        Row(min_p=0.05, seed=7),
        Row(temperature=2.5, top_p=0.999, min_p=1e-4, seed=8),
        Row(temperature=0.2, top_p=0.99, seed=9),
        Row(temperature=0.0),
        Row(temperature=5.0, top_k=600, seed=11),  # more than there are blocks
    ]
    features = Features(draw=True, filters=True)
    assert draw(ops, logits, rows, features) == reference(logits, rows, features)


def test_a_row_draws_the_same_alone_and_in_a_step_that_needs_every_branch(ops: CpuOps) -> None:
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(NUM_ROWS, 1500)) * 3).astype(np.float32)
    rows = awkward_rows(rng, 1500)
    for i in range(0, NUM_ROWS, 2):
        rows[i] = Row(temperature=0.9, seed=i)
    together, _ = draw(ops, logits, rows, ALL)
    for i in range(0, NUM_ROWS, 2):
        alone, _ = draw(ops, logits[i : i + 1], rows[i : i + 1], Features(draw=True))
        assert alone == [together[i]]


def test_rows_that_are_broken_are_flagged_and_change_no_other(ops: CpuOps) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(NUM_ROWS, 700)).astype(np.float32)
    rows = awkward_rows(rng, 700)
    want, none = draw(ops, logits, rows, ALL)
    assert not any(none)
    logits[2, 699], logits[5], logits[11, 64], logits[12] = np.nan, -np.inf, np.inf, np.nan
    tokens, fault = draw(ops, logits, rows, ALL)
    bad = [2, 5, 11, 12]
    assert np.flatnonzero(fault).tolist() == bad
    assert np.delete(tokens, bad).tolist() == np.delete(want, bad).tolist()
    assert all(0 <= token < 700 for token in tokens)


def test_threads_draw_what_one_thread_draws(ops: CpuOps) -> None:
    rng = np.random.default_rng(9)
    logits = (rng.normal(size=(NUM_ROWS, 3000)) * 3).astype(np.float32)
    rows = awkward_rows(rng, 3000)
    one = draw(ops, logits, rows, ALL)
    ops.kernels.set_threads(3)
    try:
        for _ in range(5):
            assert draw(ops, logits, rows, ALL) == one
    finally:
        ops.kernels.set_threads(1)


def test_arrays_of_another_integer_or_float_draw_the_same(ops: CpuOps) -> None:
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=(NUM_ROWS, 700)) * 3).astype(np.float32)
    rows = awkward_rows(rng, 700)
    x = torch.from_numpy(logits)
    params, positions, history, bias = map(torch.from_numpy, pack(rows, 700))
    want = ops.sample(x, params, positions, history, bias, ALL)
    wide = (params.long(), positions.long(), history.long(), bias.double())
    found = ops.sample(x.double(), *wide, ALL)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_arrays_that_do_not_fit_the_logits_are_refused(ops: CpuOps) -> None:
    x = torch.zeros(3, 100)
    params, positions, history, bias = map(torch.from_numpy, pack([Row()] * 3, 100))
    wrong = {
        "params must be": (params[:1], positions, history, bias),
        "params must": (params[:, :5], positions, history, bias),
        "positions must be": (params, positions[:2], history, bias),
        "bias must be": (params, positions, history, bias[:, :50]),
        "bias must": (params, positions, history, bias[:0]),
        "history must be": (params, positions, history[:0], bias),
    }
    for said, given in wrong.items():
        with pytest.raises(InvalidArgument, match=said):
            ops.sample(x, *given, ALL)
    ops.sample(x, params, positions, history[:0], bias[:, :50], Features(draw=True))  # nobody looks


def test_a_vocabulary_beyond_the_exact_sums_is_refused(ops: CpuOps) -> None:
    with pytest.raises(NotSupported, match="exact sums hold"):
        draw(ops, np.zeros((1, MAX_VOCAB + 1), np.float32), [Row()], Features(draw=True))


def test_the_largest_vocabulary_of_equal_logits_does_not_overflow(ops: CpuOps) -> None:
    logits, features = np.zeros((3, MAX_VOCAB), np.float32), Features(draw=True, filters=True)
    rows = [Row(seed=12), Row(seed=13, top_p=0.5), Row(seed=14, top_k=400_000, top_p=0.5)]
    assert draw(ops, logits, rows, features) == reference(logits, rows, features)
