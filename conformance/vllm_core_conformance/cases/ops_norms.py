"""Cases: RMS norm, with and without a residual, and layer norm.

Knows: rows that hurt norms. Does not know: any backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.ops_call import (
    Activation,
    Bench,
    Weights,
    regimes,
    rng_of,
    weight,
)
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

SIZES = ((1, 1, 1e-5), (7, 5, 1e-6), (24, 769, 3e-4), (130, 64, 1e-12))
"""(tokens, width, eps): no identity, no power of ten that another default would equal."""
WIDE_SIZES = ((16, 2048, 1e-6), (9, 5000, 1e-5))
REPEATS = 2


def _scale(bench: Bench, rng: np.random.Generator, width: int) -> Any:
    """Around 1 and below 0 now and then: an identity would hide the weight."""
    return bench.round((1 + 0.4 * rng.normal(size=width)) * rng.choice([1, 1, 1, -1], width))


def _rows(bench: Bench, rng: np.random.Generator, tokens: int, width: int) -> Any:
    """Where squares are summed in float32 one after the other, honestly, an outlier x 1000 swallows
    what follows it; results of 16 bits do not show that."""
    outlier = 1000.0 if bench.is_16_bit else 50.0
    return bench.round(regimes(rng, tokens, width, bench.target.dtype, outlier))


def _rms(case_id: str, sizes: Any, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(case_id, seed), Bench(target)
    for tokens, width, eps in sizes:
        for _ in range(REPEATS):
            x = _rows(bench, rng, tokens, width)
            scale = _scale(bench, rng, width)
            args = [Activation(x), Weights("norm", {"weight": scale})]
            (found,) = bench.op("rms_norm", args, eps)
            _judge_rms(bench, found, x, scale, eps, f"{tokens} x {width}, eps {eps:g}")
    return bench.done()


def _judge_rms(bench: Bench, found: Any, x: Any, scale: Any, eps: float, where: str) -> None:
    bench.judge(
        "rms_norm",
        found,
        oracle.rms_norm(x, scale, eps),
        oracle.noise_rms_norm(x, scale, eps, ratio=bench.ratio),
        where=where,
        axes=("token", "head", "dim")[3 - x.ndim :] if x.ndim == 3 else ("token", "channel"),
    )


def rms_shapes(target: Target, seed: int) -> Evidence:
    return _rms("ops.rms_norm.shapes", SIZES, target, seed)


def rms_wide(target: Target, seed: int) -> Evidence:
    return _rms("ops.rms_norm.wide", WIDE_SIZES, target, seed)


def rms_heads(target: Target, seed: int) -> Evidence:
    """Each head of q and k has a mean of its own; both are slices of one product."""
    rng, bench = rng_of("ops.rms_norm.heads", seed), Bench(target)
    tokens, width, q_heads, k_heads, dim, eps = 19, 24, 5, 3, 20, 2e-5
    fused = {"weight": bench.round(weight(rng, (q_heads + k_heads) * dim + 3, width))}
    scales = _scale(bench, rng, dim), _scale(bench, rng, dim)
    x = bench.round(rng.normal(size=(tokens, width)) * rng.choice([1e-2, 1, 30], (tokens, 1)))

    def fn(ops: Ops, x: Any, fused: Any, q_norm: Any, k_norm: Any) -> tuple[Any, ...]:
        both = ops.linear(x, fused)
        q = both[:, : q_heads * dim].reshape(tokens, q_heads, dim)
        k = both[:, q_heads * dim : (q_heads + k_heads) * dim].reshape(tokens, k_heads, dim)
        return both, ops.rms_norm(q, q_norm, eps), ops.rms_norm(k, k_norm, eps)

    norms = [Weights("norm", {"weight": scale}) for scale in scales]
    args = [Activation(x), Weights("linear", fused), *norms]
    both, *found = bench.call("rms_norm of heads", fn, args)
    both = wide(both)
    parts = both[:, : q_heads * dim], both[:, q_heads * dim : (q_heads + k_heads) * dim]
    for out, part, scale, name in zip(found, parts, scales, ("q", "k")):
        heads = part.reshape(tokens, -1, dim)
        _judge_rms(bench, out, heads, scale, eps, f"of the heads of {name}")
    return bench.done()


def add_rms(target: Target, seed: int) -> Evidence:
    rng, bench = rng_of("ops.add_rms_norm.residual", seed), Bench(target)
    for tokens, width, eps in ((1, 3, 1e-6), (26, 769, 3e-4), (130, 64, 1e-12)):
        for _ in range(REPEATS):
            x = _rows(bench, rng, tokens, width)
            residual = bench.round(rng.normal(size=x.shape) * 3)
            residual[::5] = x[::5]  # a sum that no rounding spoils
            scale = _scale(bench, rng, width)
            args = [Activation(x), Activation(residual), Weights("norm", {"weight": scale})]
            normed, total = bench.op("add_rms_norm", args, eps)
            exact = oracle.add_rms_norm(x, residual, scale, eps)
            noise = oracle.noise_add_rms_norm(x, residual, scale, eps, ratio=bench.ratio)
            where, axes = f"{tokens} x {width}, eps {eps:g}", ("token", "channel")
            bench.judge("residual_sum", total, exact[1], noise[1], where=where, axes=axes)
            bench.judge("add_rms_norm", normed, exact[0], noise[0], where=where, axes=axes)
    return bench.done()


def _layer(case_id: str, sizes: Any, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(case_id, seed), Bench(target)
    for place, (tokens, width, eps) in enumerate(sizes):
        for _ in range(REPEATS):
            x = _rows(bench, rng, tokens, width)
            tensors = {"weight": _scale(bench, rng, width)}
            if place != 1:
                tensors["bias"] = bench.round(rng.normal(size=width))
            (found,) = bench.op("layer_norm", [Activation(x), Weights("norm", tensors)], eps)
            args = x, tensors["weight"], tensors.get("bias"), eps
            bench.judge(
                "layer_norm",
                found,
                oracle.layer_norm(*args),
                oracle.noise_layer_norm(*args, ratio=bench.ratio),
                where=f"{tokens} x {width}, eps {eps:g}",
                axes=("token", "channel"),
            )
    return bench.done()


def layer_shapes(target: Target, seed: int) -> Evidence:
    return _layer("ops.layer_norm.shapes", SIZES, target, seed)


def layer_wide(target: Target, seed: int) -> Evidence:
    return _layer("ops.layer_norm.wide", WIDE_SIZES, target, seed)


_CORE, _SMOKE = frozenset({"core"}), frozenset({"core", "smoke"})

CASES: tuple[Case, ...] = (
    Case(
        "ops.rms_norm.shapes",
        "norms rows of zeros, outliers, denormals and values small beside eps, in float32",
        rms_shapes,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.rms_norm.wide",
        "norms 2048 and 5000 channels without losing a tile's tail",
        rms_wide,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.rms_norm.heads",
        "norms each head of q and k by itself, as slices of one product",
        rms_heads,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.add_rms_norm.residual",
        "norms the sum with the residual, and gives that sum back",
        add_rms,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.layer_norm.shapes",
        "subtracts a mean that dwarfs the spread, divides by the biased deviation, adds the bias",
        layer_shapes,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.layer_norm.wide",
        "does so over 2048 and 5000 channels",
        layer_wide,
        _CORE,
        every_dtype=True,
    ),
)
