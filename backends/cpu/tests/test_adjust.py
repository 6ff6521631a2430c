"""The kernels for bias, penalties and log-probabilities give what the portable text gives.

Knows: the portable text, rows that use everything. Does not know: how the kernels do it
(csrc_tests/test_adjust.cpp and test_logprobs.cpp hold them to the law itself).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_core.bindings.numpy import NumpyOps
from vllm_core.bindings.torch.ops import TorchOps
from vllm_core.errors import InvalidArgument
from vllm_core.ops import Features, HostArray, Logprobs
from vllm_core.ops.sampling import adjusted
from vllm_core.tests.ops.sampling_oracle import Packed, Row, pack
from vllm_core.tests.ops.test_logprobs import awkward, oracle
from vllm_core.tests.ops.test_sampling import NUM_ROWS, awkward_logits, awkward_rows
from vllm_core_cpu.ops import CpuOps

TORCH = TorchOps(torch.device("cpu"))
EVERYTHING = Features(bias=True, penalties=True)


def adjust(ops: CpuOps | TorchOps, logits: HostArray, packed: Packed, features: Features) -> Any:
    x, params, positions, history, bias = map(torch.from_numpy, (logits, *packed))
    if isinstance(ops, CpuOps):
        return ops._adjusted(x, params, positions, history, bias, features).numpy()
    return adjusted(ops, x, params, positions, history, bias, features).numpy()


def check_adjusted(ops: CpuOps, logits: HostArray, packed: Packed, features: Features) -> None:
    """To the last bit."""
    before = logits.copy()
    found = adjust(ops, logits, packed, features)
    assert (logits.view(np.int32) == before.view(np.int32)).all()
    with np.errstate(all="ignore"):
        numpys = adjusted(NumpyOps(), logits, *packed, features)
    for want in (numpys, adjust(TORCH, logits, packed, features)):
        bits = np.where(np.isnan(want), np.float32(np.nan), want).view(np.int32)
        got = np.where(np.isnan(found), np.float32(np.nan), found).view(np.int32)
        assert (got == bits).all()


@pytest.mark.parametrize("vocab", [1, 2, 65, 300, 3000])
def test_adjusted_logits_have_the_bits_of_the_portable_text(ops: CpuOps, vocab: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng([vocab, seed])
        logits = awkward_logits(rng, vocab)
        rows = [
            replace(
                row,
                presence=float(rng.normal()),
                frequency=float(rng.normal()),
                repetition=float(rng.uniform(0.5, 2)),
            )
            for row in awkward_rows(rng, vocab)
        ]
        for features in (EVERYTHING, Features(bias=True), Features(penalties=True)):
            check_adjusted(ops, logits, pack(rows, vocab), features)


def test_long_answers_over_a_large_vocabulary_have_the_bits_of_the_portable_text(
    ops: CpuOps,
) -> None:
    rng, vocab = np.random.default_rng(1), 151_936
    logits = (rng.normal(size=(3, vocab)) * 4).astype(np.float32)
    rows = [
        Row(
            tokens=tuple((rng.zipf(1.3, 2000) % vocab).tolist()),
            prompt_len=700,
            presence=0.3,
            frequency=0.1,
            repetition=repetition,
            bias={5: -np.inf, 9: 1.5},
            held=(vocab - 1, 12),
            held_until=3000,
        )
        for repetition in (1.0, 1.1, 1.7)
    ]
    check_adjusted(ops, logits, pack(rows, vocab), EVERYTHING)


def test_a_row_that_asks_for_nothing_keeps_its_bits_beside_rows_that_ask(ops: CpuOps) -> None:
    rng = np.random.default_rng(2)
    logits = awkward_logits(rng, 700)
    rows = awkward_rows(rng, 700)
    rows[3] = Row(tokens=(5, 6, 5), prompt_len=1)
    found = adjust(ops, logits, pack(rows, 700), Features(penalties=True))
    assert (found[3].view(np.int32) == logits[3].view(np.int32)).all()


def report(ops: CpuOps | TorchOps | NumpyOps, x: HostArray, at: HostArray, count: int) -> Logprobs:
    with np.errstate(all="ignore"):
        found = ops.logprobs(ops.asarray(x), ops.asarray(at), count)
    return Logprobs(*map(ops.host, found))


@pytest.mark.parametrize("count", [0, 1, 5, 20, 300])
@pytest.mark.parametrize("vocab", [1, 2, 65, 5000])
def test_logprobs_have_the_ids_of_the_portable_text_and_the_values_of_float64(
    ops: CpuOps, vocab: int, count: int
) -> None:
    logits, targets = awkward(vocab)
    targets[:2] = -1, vocab  # are clipped
    count = min(count, vocab)
    found = report(ops, logits, targets, count)
    for other in (NumpyOps(), TORCH):
        want = report(other, logits, targets, count)
        assert (found.ids == want.ids).all()
        assert (found.rank == want.rank).all()
        assert [x.dtype for x in found] == [x.dtype for x in want]
        assert (np.isneginf(found.values) == np.isneginf(want.values)).all()
    exact = np.take_along_axis(oracle(logits)[0], found.ids, -1)
    live = np.isfinite(exact)
    # the portable text rounds the sum first: by 1e-3 where logits are 1e4
    noise = 2.0**-24 * (4 + np.abs(exact[live]))
    assert (np.abs(found.values[live] - exact[live]) <= noise).all()


def test_more_alternatives_than_tokens_are_refused_as_the_portable_text_does(ops: CpuOps) -> None:
    with pytest.raises(RuntimeError, match="out of range"):
        report(ops, *awkward(5), 6)


def test_targets_that_are_not_one_for_each_row_are_refused(ops: CpuOps) -> None:
    logits, targets = awkward(5)
    with pytest.raises(InvalidArgument, match="targets must be"):
        report(ops, logits, targets[:1], 2)


def test_logprobs_of_a_row_do_not_depend_on_the_others(ops: CpuOps) -> None:
    rng = np.random.default_rng(4)
    logits = (rng.normal(size=(NUM_ROWS, 3000)) * 3).astype(np.float32)
    targets = rng.integers(0, 3000, NUM_ROWS).astype(np.int32)
    ops.kernels.set_threads(3)
    try:
        together = report(ops, logits, targets, 5)
    finally:
        ops.kernels.set_threads(1)
    for i in range(NUM_ROWS):
        alone = report(ops, logits[i : i + 1], targets[i : i + 1], 5)
        assert all((a[0] == b[i]).all() for a, b in zip(alone, together, strict=True))
