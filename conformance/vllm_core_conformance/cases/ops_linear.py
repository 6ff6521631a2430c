"""Cases: embed, linear and logits.

Knows: sizes that hurt matrix kernels. Does not know: any backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.ops_call import (
    Activation,
    Bench,
    Fixed,
    Weights,
    regimes,
    rng_of,
    weight,
)
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

SMALL_SIZES = (
    (1, 1, 1, False),
    (7, 5, 3, True),
    (3, 37, 37, True),
    (1, 130, 9, True),
    (130, 129, 65, True),
)
"""(tokens, inputs, outputs, bias): ones, odd, no powers of two; square; few rows with a bias."""
WIDE_SIZES = ((7, 768, 320, False), (33, 2048, 96, True), (5, 5000, 41, False))
"""Of a model's size, and a sum over several tiles that none divides."""
HEAD_SIZES = ((1, 40, 3, False), (5, 129, 1000, False), (9, 768, 517, True))
REPEATS = 2
"""Calls of one shape with other numbers: what was kept from the first would show."""


def _products(case_id: str, op: str, role: str, sizes: Any, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(case_id, seed), Bench(target)
    for tokens, width, out, has_bias in sizes:
        for _ in range(REPEATS):
            x = bench.round(regimes(rng, tokens, width, target.dtype))
            tensors = {"weight": bench.round(weight(rng, out, width))}
            if has_bias:
                tensors["bias"] = bench.round(rng.normal(size=out) * 3)
            (found,) = bench.op(op, [Activation(x), Weights(role, tensors)])
            _judge_product(bench, op, found, x, tensors)
    return bench.done()


def _judge_product(
    bench: Bench, op: str, found: Any, x: Any, tensors: dict[str, Any], where: str = ""
) -> None:
    single = op == "logits"
    pair = (tensors["weight"], tensors.get("bias"))
    exact = oracle.linear(x, *pair)
    if single:
        noise = oracle.noise_logits(x, *pair, is_16_bit=bench.is_16_bit)
    else:
        noise = oracle.noise_linear(x, *pair, ratio=bench.ratio)
    shape = f"{x.shape[0]} x {x.shape[1]} -> {exact.shape[1]}"
    bench.judge(
        "logits/16" if single and bench.is_16_bit else op,
        found,
        exact,
        noise,
        where=f"{where or shape}{' + bias' if pair[1] is not None else ''}",
        axes=("token", "output"),
        single=single,
        by_class=True,
    )


def linear_shapes(target: Target, seed: int) -> Evidence:
    return _products("ops.linear.shapes", "linear", "linear", SMALL_SIZES, target, seed)


def linear_wide(target: Target, seed: int) -> Evidence:
    return _products("ops.linear.wide", "linear", "linear", WIDE_SIZES, target, seed)


def logits_shapes(target: Target, seed: int) -> Evidence:
    return _products("ops.logits.shapes", "logits", "linear", HEAD_SIZES, target, seed)


GATED_SIZES = ((1, 40, 64, False), (7, 37, 21, True), (33, 300, 128, True), (130, 65, 5, False))
"""(tokens, inputs, outputs, bias)"""


def gated_shapes(target: Target, seed: int) -> Evidence:
    """Some gates are far out on both sides."""
    rng, bench = rng_of("ops.gated_linear.shapes", seed), Bench(target)
    for tokens, width, out, has_bias in GATED_SIZES:
        for kind in ("silu", "gelu_tanh"):
            size = rng.permutation(np.resize([0.3, 2.0, 20.0], tokens))[:, None]
            x = bench.round(rng.normal(size=(tokens, width)) * size)
            tensors = {"weight": bench.round(weight(rng, 2 * out, width))}
            if has_bias:
                tensors["bias"] = bench.round(rng.normal(size=2 * out))
            args = [Activation(x), Weights("linear", tensors)]
            (found,) = bench.op("gated_linear", args, kind)
            pair = (tensors["weight"], tensors.get("bias"))
            bench.judge(
                "gated_linear",
                found,
                oracle.gated_linear(x, *pair, kind),
                oracle.noise_gated_linear(x, *pair, kind, ratio=bench.ratio),
                where=f"{tokens} x {width} -> {out}, {kind}",
                axes=("token", "output"),
                by_class=True,
            )
    return bench.done()


def linear_slices(target: Target, seed: int) -> Evidence:
    """Columns of one product, and heads of it, are multiplied again without being copied first."""
    rng, bench = rng_of("ops.linear.slices", seed), Bench(target)
    tokens, width, heads, dim = 11, 40, 3, 10
    fused = {"weight": bench.round(weight(rng, 2 * heads * dim + 7, width))}
    fused["bias"] = bench.round(rng.normal(size=len(fused["weight"])))
    last = {"weight": bench.round(weight(rng, 9, heads * dim))}
    each = {"weight": bench.round(weight(rng, 5, dim))}
    x = bench.round(rng.normal(size=(tokens, width)))

    def fn(ops: Ops, x: Any, fused: Any, last: Any, each: Any) -> tuple[Any, ...]:
        both = ops.linear(x, fused)
        middle = both[:, 7 : 7 + heads * dim]
        by_head = both[:, 7 + heads * dim :].reshape(tokens, heads, dim)
        again = both[:, : heads * dim]
        return (
            both,
            *(ops.linear(part, last) for part in (middle, again)),
            *(ops.linear(by_head[:, head], each) for head in (1, 2)),
        )

    args = [Activation(x), *(Weights("linear", w) for w in (fused, last, each))]
    both, one, again, two, three = bench.call("linear of slices", fn, args)
    _judge_product(bench, "linear", both, x, fused, where="fused")
    both = wide(both)
    start = 7 + heads * dim
    _judge_product(bench, "linear", one, both[:, 7:start], last, where="of columns of a product")
    first = both[:, : heads * dim]
    _judge_product(bench, "linear", again, first, last, where="of the first columns of a product")
    for head, out in ((1, two), (2, three)):
        x = both[:, start + head * dim : start + (head + 1) * dim]
        _judge_product(bench, "linear", out, x, each, where=f"of head {head} of a product")
    return bench.done()


def tied(target: Target, seed: int) -> Evidence:
    """One parameter is the embedding and the head, in either order of use."""
    rng, bench = rng_of("ops.logits.tied", seed), Bench(target)
    vocab, width, tokens = 515, 72, 6
    table = bench.round(weight(rng, vocab, width))
    x = bench.round(
        rng.normal(size=(tokens, width)) * rng.permutation([1, 1, 8, 30, 30, 90])[:, None]
    )
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    param = target.param("embedding", {"weight": table})
    ops = target.ops
    for turn in ("before", "after"):
        arrays = target.array(ids), target.array(x)
        (rows,) = target.call(
            ("ops", "tied embed"), lambda i, p: (ops.embed(i, p),), arrays[0], param
        )
        bench.equal(rows, table[ids], f"embed {turn} the table was a head", axes=("token", "dim"))
        (found,) = target.call(
            ("ops", "tied logits"), lambda h, p: (ops.logits(h, p),), arrays[1], param
        )
        _judge_product(bench, "logits", found, x, {"weight": table}, where="of a tied embedding")
    return bench.done()


def embed_rows(target: Target, seed: int) -> Evidence:
    """Rows are copied bit for bit, from the first to the last of a real vocabulary."""
    rng, bench = rng_of("ops.embed.rows", seed), Bench(target)
    for tokens, vocab, width in ((1, 1, 1), (7, 65, 129), (130, 151_936, 3)):
        table = bench.round(
            rng.normal(size=(vocab, width)) * rng.choice([1e-3, 1, 1e3], (vocab, 1))
        )
        for _ in range(REPEATS):
            ids = rng.integers(0, vocab, tokens).astype(np.int32)
            ids[:3] = (vocab - 1, 0, vocab - 1)[:tokens]
            ids[tokens // 2 :: 9] = ids[0]  # repeats
            (rows,) = bench.op("embed", [Fixed(ids), Weights("embedding", {"weight": table})])
            found = rows.dtype.name
            if found != target.dtype:
                bench._check_dtype("embed", rows, "embed", False)
            bench.equal(rows, table[ids], f"embed from {vocab} x {width}", axes=("token", "dim"))
    return bench.done()


def no_tokens(target: Target, seed: int) -> Evidence:
    """A step without tokens: results are empty and have their shapes."""
    rng, bench = rng_of("ops.rows.none", seed), Bench(target)
    x = np.zeros((0, 8))
    square = Weights("linear", {"weight": bench.round(weight(rng, 6, 8))})
    norm = Weights("norm", {"weight": bench.round(1 + rng.normal(size=8) / 4)})
    calls: tuple[tuple[str, list[Any], tuple[Any, ...], int], ...] = (
        ("linear", [Activation(x), square], (), 6),
        ("rms_norm", [Activation(x), norm], (1e-5,), 8),
        ("silu_and_mul", [Activation(x)], (), 4),
    )
    for op, args, static, width in calls:
        (found,) = bench.op(op, args, *static)
        bench.equal(found, np.zeros((0, width)), f"{op} of no tokens")
    return bench.done()


_CORE, _SMOKE = frozenset({"core"}), frozenset({"core", "smoke"})

CASES: tuple[Case, ...] = (
    Case(
        "ops.linear.shapes",
        "multiplies odd sizes and single rows, with and without a bias, in float32 accumulation",
        linear_shapes,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.linear.wide",
        "sums over 768, 2048 and 5000 inputs without losing float32 accumulation or a tile's tail",
        linear_wide,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.gated_linear.shapes",
        "multiplies, and gates the first half of the columns with the second",
        gated_shapes,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.linear.slices",
        "multiplies columns and heads of an earlier product where they lie",
        linear_slices,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.logits.shapes",
        "gives logits in float32 although the model has 16 bits",
        logits_shapes,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.logits.tied",
        "uses one table as embedding and as head, in any order",
        tied,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.embed.rows",
        "copies the rows of a table bit for bit, the last of 151,936 too",
        embed_rows,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.rows.none",
        "gives empty results for no tokens",
        no_tokens,
        _CORE,
        scored=False,
    ),
)
