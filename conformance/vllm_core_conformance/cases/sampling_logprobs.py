"""Cases: log-probabilities, alternatives and ranks of raw logits.

Knows: rows that hurt a log-sum-exp. Does not know: any backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases.ops_call import Bench, rng_of
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

SHAPES = ((1, 0), (1, 1), (65, 0), (65, 1), (65, 5), (1000, 20))
"""(vocabulary, alternatives)"""
ROWS = 18


def _logits(rng: np.random.Generator, vocab: int) -> Any:
    x = rng.normal(size=(ROWS, vocab)) * rng.choice([0.1, 1, 4], (ROWS, 1))
    x[1] *= 50
    x[2] = np.round(x[2])
    x[3] += 1e4
    x[4, rng.random(vocab) < 0.5] = -np.inf
    x[4, 0] = 1.0
    x[5] = 0
    x[6] -= 1e4
    x[7, rng.integers(vocab)] = 300
    x[8] = -np.inf
    x[8, rng.integers(vocab)] = 2.0
    x[9] = np.where(rng.random(vocab) < 0.7, 0.0, -0.0)
    return x.astype(np.float32).astype(np.float64)


def _report(target: Target, logits: Any, targets: Any, count: int) -> Any:
    ops = target.ops
    (found,) = target.call(
        ("logprobs", count),
        lambda x, t: (ops.logprobs(x, t, count),),
        target.array(logits, "float32"),
        target.array(targets),
    )
    return found


def _judge(bench: Bench, found: Any, logits: Any, targets: Any, count: int, where: str) -> None:
    ids, values, rank, noise = oracle.logprobs(logits, targets, count)
    shape = (len(logits), 1 + count)
    for name, part in (("ids", found.ids), ("values", found.values)):
        require(
            np.shape(part) == shape,
            f"logprobs: {name} have shape {list(np.shape(part))}, expected "
            f"{list(shape)} for {count} alternatives",
        )
    what = f"logprobs, {where}"
    bench.equal(found.ids[:, 0], targets, f"{what}: column 0 is the target", axes=("row",))
    bench.equal(
        found.ids[:, 1:],
        ids[:, 1:],
        f"{what}: alternatives, likeliest first, ties to the lowest id",
        axes=("row", "rank"),
    )
    bench.equal(
        found.rank, rank, f"{what}: rank is 1 + the number of likelier tokens", axes=("row",)
    )
    none = np.isneginf(values)
    got = wide(found.values)
    bench.equal(np.isneginf(got), none, f"{what}: banned tokens have -inf", axes=("row", "column"))
    live = np.where(none, 0.0, got).astype(np.float32)
    bench.judge(
        "logprobs",
        live if found.values.dtype.name == "float32" else found.values,
        np.where(none, 0.0, values),
        noise,
        where=where,
        axes=("row", "column"),
        single=True,
    )


def values(target: Target, seed: int) -> Evidence:
    rng, bench = rng_of("sampling.logprobs.values", seed), Bench(target)
    for vocab, count in SHAPES:
        for _ in range(2):
            logits = _logits(rng, vocab)
            targets = rng.integers(0, vocab, ROWS).astype(np.int32)
            targets[:2] = (0, vocab - 1)
            targets[3] = int(np.argmax(logits[3]))
            found = _report(target, logits, targets, count)
            where = f"{count} alternatives of {vocab} tokens"
            _judge(bench, found, logits, targets, count, where)
    return bench.done()


def neighbours(target: Target, seed: int) -> Evidence:
    """Rows of NaN and infinities leave the others alone."""
    rng, bench = rng_of("sampling.logprobs.rows", seed), Bench(target)
    logits = _logits(rng, 65)
    targets = rng.integers(0, 65, ROWS).astype(np.int32)
    bad = 9 + rng.permutation(ROWS - 9)[:4]
    broken = logits.copy()
    broken[bad[0]], broken[bad[1]] = np.nan, -np.inf
    broken[bad[2], 3], broken[bad[3], 64] = np.nan, np.inf
    found = _report(target, broken, targets, 5)
    good = np.setdiff1d(np.arange(ROWS), bad)
    some = type(found)(*(np.asarray(part)[good] for part in found))
    _judge(bench, some, logits[good], targets[good], 5, "beside broken rows")
    return bench.done()


CASES: tuple[Case, ...] = (
    Case(
        "sampling.logprobs.values",
        "reports log-probabilities, ranks and alternatives of the raw logits",
        values,
        frozenset({"core", "smoke"}),
    ),
    Case(
        "sampling.logprobs.rows",
        "reports them for sound rows beside broken ones",
        neighbours,
        frozenset({"core"}),
    ),
)
