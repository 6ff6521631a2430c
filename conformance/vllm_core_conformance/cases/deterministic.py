"""Cases: the same bits again, in this runtime and in a new one; and in any batch, where declared.

Scored in the profile `deterministic` only: the seam promises equal bits for data movement and
sampling, not for sums. Batch invariance is a promise: who does not give it is not measured by it.

Knows: ops as programs, scenes. Does not know: what is right.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import AttentionSpec, KVFormat
from vllm_core.backend.step import scrap_params
from vllm_core.errors import NotSupported
from vllm_core.ops import Column, Features
from vllm_core_conformance.case import Case, Evidence, Failed
from vllm_core_conformance.cases.attention_shapes import batches
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.steps import Scene, Seen, Shape, Stage
from vllm_core_conformance.target import Raised, Target, wide

Numbers = NDArray[Any]
Body = Callable[[Target, np.random.Generator], Evidence]
Results = tuple[Numbers, ...]

TIMES = 5
LONGEST = 128
"""Tokens of a sequence."""


# ---- the same bits again
def _again(target: Target, make: Callable[[Target], Callable[[], Results]], what: str) -> Evidence:
    """make(target) -> a function that computes; TIMES here, then in a fresh runtime."""
    compute = make(target)
    first, evidence = compute(), Evidence()
    for time in range(2, TIMES + 1):
        for i, (got, want) in enumerate(zip(compute(), first, strict=True)):
            evidence += require_equal(
                got, want, f"{what}, result {i}, run {time} against run 1", nan_equal=True
            )
    other = target.fresh()
    for i, (got, want) in enumerate(zip(make(other)(), first, strict=True)):
        evidence += require_equal(
            got, want, f"{what}, result {i}, in another runtime", nan_equal=True
        )
    other.close()
    return evidence


def _wide(found: tuple[Any, ...]) -> Results:
    return tuple(wide(x) for x in found)


def repeat_attention(target: Target, rng: np.random.Generator) -> Evidence:
    """A mixed step on the same cache."""
    scene = _scene(target, rng)

    def make(own: Target) -> Callable[[], Results]:
        stage = Stage(own, scene.shape)

        def compute() -> Results:
            stage.write_cache(scene)
            seen = stage.play(scene)
            return seen.out[: scene.num_tokens], _lse(seen)[: scene.num_tokens]

        return compute

    return _again(target, make, "attention of a mixed step")


def repeat_linear(target: Target, rng: np.random.Generator) -> Evidence:
    """linear and logits with many columns to sum."""
    x = target.round(rng.normal(size=(24, 768)))
    weight = target.round(rng.normal(size=(320, 768)) / 28)
    bias = target.round(rng.normal(size=320))

    def make(own: Target) -> Callable[[], Results]:
        param = own.param("linear", {"weight": weight, "bias": bias})
        array = own.array(x)

        def fn(x: Any, p: Any) -> tuple[Any, ...]:
            return own.ops.linear(x, p), own.ops.logits(x, p)

        return lambda: _wide(own.call("repeat linear", fn, array, param))

    return _again(target, make, "linear and logits")


def repeat_norms(target: Target, rng: np.random.Generator) -> Evidence:
    """Norms and a gated activation over long rows."""
    x, residual = (target.round(rng.normal(size=(24, 1536))) for _ in range(2))
    tensors = {n: target.round(rng.normal(size=1536)) for n in ("weight", "bias")}

    def make(own: Target) -> Callable[[], Results]:
        param = own.param("norm", tensors)
        arrays = own.array(x), own.array(residual)

        def fn(x: Any, r: Any, p: Any) -> tuple[Any, ...]:
            ops = own.ops
            normed, total = ops.add_rms_norm(x, r, p, 1e-5)
            more = ops.layer_norm(x, p, 1e-5), ops.silu_and_mul(x)
            return (ops.rms_norm(x, p, 1e-5), normed, total, *more)

        return lambda: _wide(own.call("repeat norms", fn, *arrays, param))

    return _again(target, make, "norms")


def repeat_experts(target: Target, rng: np.random.Generator) -> Evidence:
    """Several experts add into one token: in the same order each time."""
    x = target.round(rng.normal(size=(24, 64)))
    router = target.round(rng.normal(size=(24, 8)))
    up = target.round(rng.normal(size=(8, 96, 64)) / 8)
    down = target.round(rng.normal(size=(8, 64, 48)) / 7)

    def make(own: Target) -> Callable[[], Results]:
        params = own.param("experts", {"weight": up}), own.param("experts", {"weight": down})
        arrays = own.array(x), own.array(router), own.array(np.arange(24) < 22)

        def fn(x: Any, router: Any, valid: Any, up: Any, down: Any) -> tuple[Any, ...]:
            ids, weights = own.ops.moe_route(router, 4, True, valid)
            return ids, weights, own.ops.moe_experts(x, ids, weights, up, down)

        return lambda: _wide(own.call("repeat experts", fn, *arrays, *params))

    return _again(target, make, "routing and experts")


def repeat_sample(target: Target, rng: np.random.Generator) -> Evidence:
    """Draws with filters and penalties, and log-probabilities."""
    vocab, rows = 900, 6
    logits = (3 * rng.normal(size=(rows, vocab))).astype(np.float32)
    columns = np.repeat(scrap_params(1, 0)[None], rows, 0)

    def bits(x: float) -> np.int32:
        return np.float32(x).view(np.int32)

    columns[:, Column.TEMPERATURE] = [bits(t) for t in rng.uniform(0.5, 1.5, rows)]
    columns[:, Column.TOP_K] = rng.integers(5, 200, rows)
    columns[:, Column.TOP_P] = bits(0.93)
    columns[:, Column.REPETITION] = bits(1.2)
    columns[:, Column.SEED_LOW] = rng.integers(0, 2**31, rows)
    columns[:, Column.HISTORY_SLOT] = 0
    history = rng.integers(0, vocab, (2, 16)).astype(np.int32)
    features = Features(draw=True, filters=True, penalties=True)

    def make(own: Target) -> Callable[[], Results]:
        arrays = (
            own.array(logits, "float32"),
            own.array(columns),
            own.array(np.arange(rows, dtype=np.int32) + 9),
            own.array(history),
            own.array(np.zeros((1, vocab), np.float32), "float32"),
        )

        def fn(logits: Any, params: Any, places: Any, history: Any, bias: Any) -> tuple[Any, ...]:
            ops = own.ops
            tokens, fault = ops.sample(logits, params, places, history, bias, features)
            return tokens, fault, *ops.logprobs(logits, tokens, 4)

        return lambda: _wide(own.call("repeat sample", fn, *arrays))

    return _again(target, make, "draws and log-probabilities")


# ---- the same bits in any batch
def _promised(body: Body) -> Body:
    """Without the promise, bits that differ are no fault."""

    def run(target: Target, rng: np.random.Generator) -> Evidence:
        if target.caps.batch_invariant:
            return body(target, rng)
        try:
            body(target, rng)
            seen = "no difference was seen"
        except Failed as failure:
            seen = failure.sentence
        raise Raised("batch invariance", NotSupported(f"not declared; {seen}"))

    return run


def rows_alone(target: Target, rng: np.random.Generator) -> Evidence:
    """linear, logits, norms and a gate: rows alone, a few, and all together."""
    x = target.round(rng.normal(size=(24, 512)))
    weight = target.round(rng.normal(size=(192, 512)) / 22)
    norm = target.round(rng.normal(size=512))
    params = target.param("linear", {"weight": weight}), target.param("norm", {"weight": norm})

    def fn(x: Any, p: Any, n: Any) -> tuple[Any, ...]:
        ops = target.ops
        more = ops.rms_norm(x, n, 1e-5), ops.silu_and_mul(x)
        return (ops.linear(x, p), ops.logits(x, p), *more)

    def compute(rows: Numbers) -> Results:
        return _wide(target.call(("invariant", len(rows)), fn, target.array(x[rows]), *params))

    whole, evidence = compute(np.arange(24)), Evidence()
    names = ("linear", "logits", "rms_norm", "silu_and_mul")
    for size in (1, 3, 16):
        rows = rng.permutation(24)[:size]
        for name, some, every in zip(names, compute(rows), whole, strict=True):
            evidence += require_equal(
                some,
                every[rows],
                f"{name} of {size} rows against the same rows among 24",
                axes=("row", "column"),
            )
    return evidence


def experts_alone(target: Target, rng: np.random.Generator) -> Evidence:
    """Rows of the experts alone, a few, and all together."""
    x = target.round(rng.normal(size=(24, 64)))
    router = target.round(rng.normal(size=(24, 8)))
    up = target.param("experts", {"weight": target.round(rng.normal(size=(8, 96, 64)) / 8)})
    down = target.param("experts", {"weight": target.round(rng.normal(size=(8, 64, 48)) / 7)})

    def fn(x: Any, router: Any, valid: Any, up: Any, down: Any) -> tuple[Any, ...]:
        ids, weights = target.ops.moe_route(router, 2, True, valid)
        return (target.ops.moe_experts(x, ids, weights, up, down),)

    def compute(rows: Numbers) -> Numbers:
        arrays = target.array(x[rows]), target.array(router[rows]), np.ones(len(rows), bool)
        tag = "invariant experts", len(rows)
        return wide(target.call(tag, fn, *arrays[:2], target.array(arrays[2]), up, down)[0])

    whole, evidence = compute(np.arange(24)), Evidence()
    for size in (1, 3, 16):
        rows = rng.permutation(24)[:size]
        evidence += require_equal(
            compute(rows),
            whole[rows],
            f"experts of {size} rows against the same rows among 24",
            axes=("row", "column"),
        )
    return evidence


def _shape(target: Target) -> Shape:
    spec = AttentionSpec(6, 2, 64, 64, 0.11, KVFormat(target.dtype), group=0)
    size = target.usual_block(spec)
    width = -(-LONGEST // size)
    return Shape(
        num_q_heads=6,
        num_kv_heads=2,
        dim=64,
        block_tokens=size,
        num_blocks=3 * width + 16,
        tokens=min(48, target.constraints().max_tokens or 48),
        rows=4,
        width=width,
        scale=0.11,
        return_lse=True,
    )


def _scene(target: Target, rng: np.random.Generator) -> Scene:
    """Three rows: one token, one token, and 30 behind a prefix; fewer where a step may not hold
    them."""
    shape = _shape(target)
    rows = [(int(rng.integers(1, 120)), 1), (int(rng.integers(1, 40)), 1), (64, 30)]
    rows = batches(target, rows)[-1]
    cached, query = (np.array(x) for x in zip(*rows, strict=True))
    n, total = len(rows), int(query.sum())
    heads = (shape.num_blocks, shape.layers, shape.block_tokens, shape.num_kv_heads, shape.dim)

    def normal(*size: int) -> Numbers:
        return target.round(rng.normal(size=size))

    tables = rng.permutation(np.arange(1, shape.num_blocks))[: n * shape.width]
    return Scene(
        shape,
        state_rows=rng.permutation(shape.rows_for_life)[:n],
        cached=cached,
        query=query,
        tables=tables.reshape(n, shape.width).astype(np.int32),
        keys=normal(*heads),
        values=normal(*heads),
        q=normal(total, shape.num_q_heads, shape.dim),
        k=normal(total, shape.num_kv_heads, shape.dim),
        v=normal(total, shape.num_kv_heads, shape.dim),
    )


def _lse(seen: Seen) -> Numbers:
    if seen.lse is None:
        raise Failed("attention with return_lse gave None for the log-sum-exp")
    return seen.lse


def _part(scene: Scene, row: int, begin: int, end: int) -> Scene:
    """Tokens begin..end of one row, behind what precedes them in the step."""
    here = slice(int(scene.starts[row]) + begin, int(scene.starts[row]) + end)
    return replace(
        scene,
        state_rows=scene.state_rows[row : row + 1],
        cached=scene.cached[row : row + 1] + begin,
        query=np.array([end - begin]),
        tables=scene.tables[row : row + 1],
        q=scene.q[here],
        k=scene.k[here],
        v=scene.v[here],
    )


def attention_in_any_batch(target: Target, rng: np.random.Generator) -> Evidence:
    """Rows of a step alone, a prefill in three chunks, and padded or not: the same bits."""
    scene, evidence = _scene(target, rng), Evidence()
    stage = Stage(target, scene.shape)
    stage.write_cache(scene)
    whole = stage.play(scene)
    all_lse = _lse(whole)
    plays = [("alone", row, 0, int(count)) for row, count in enumerate(scene.query)]
    last, length = len(plays) - 1, int(scene.query[-1])
    if target.constraints().chunk_multiple == 1:
        cuts = [0, *sorted(rng.permutation(np.arange(1, length))[:2].tolist()), length]
        plays += [(f"tokens {a}..{b - 1} as a chunk", last, a, b) for a, b in pairwise(cuts)]
    for exact in (False, True):
        stage.write_cache(scene)
        for text, row, begin, end in plays:
            part = replace(_part(scene, row, begin, end), exact_shapes=exact)
            seen, at = stage.play(part), int(scene.starts[row])
            what = f"row {row} {text}{', not padded' if exact else ''}, against the whole step"
            for name, some, every in (("out", seen.out, whole.out), ("lse", _lse(seen), all_lse)):
                evidence += require_equal(
                    some[: end - begin],
                    every[at + begin : at + end],
                    f"attention {name}, {what}",
                    axes=("token", "head", "lane")[: some.ndim],
                )
    return evidence


def _case(name: str, says: str, body: Body, *needs: str) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        crc = zlib.crc32(f"deterministic.{name}".encode())
        return body(target, np.random.default_rng([seed, crc]))

    return Case(
        f"deterministic.{name}", says, run, frozenset({"deterministic"}), needs=tuple(needs)
    )


CASES: tuple[Case, ...] = (
    _case("repeat.attention", "attention gives the same bits again", repeat_attention,
          "return_lse"),
    _case("repeat.linear", "matrix products give the same bits again", repeat_linear),
    _case("repeat.norms", "norms give the same bits again", repeat_norms),
    _case("repeat.experts", "experts add up in the same order each time", repeat_experts),
    _case("repeat.sample", "draws and log-probabilities are the same again", repeat_sample),
    _case("batch.rows", "a row's bits do not depend on the other rows", _promised(rows_alone),
          "batch_invariant"),
    _case("batch.experts", "what experts give a row does not depend on the other rows",
          _promised(experts_alone), "batch_invariant"),
    _case("batch.attention", "attention's bits do not depend on batch, chunks or padding",
          _promised(attention_in_any_batch), "batch_invariant", "return_lse"),
)  # fmt: skip
