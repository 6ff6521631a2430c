"""Cases: activations, alone and gated.

Knows: arguments that overflow a careless exp. Does not know: any backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.ops_call import Activation, Bench, Weights, regimes, rng_of, weight
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

EDGES = (0.0, -0.0, 1e-3, -1e-3, 5.0, -5.0, 12.0, -12.0, 88.5, -88.5, 100.0, -100.0, 240.0, -240.0)
SIZES = ((1, 1), (7, 5), (130, 65), (9, 769))
"""(tokens, width of each half)"""


def arguments(rng: np.random.Generator, rows: int, width: int, dtype: str) -> Any:
    """Dense where the slopes are, and far out on both sides; nothing leaves the dtype's range."""
    x = np.where(rng.random((rows, width)) < 0.5, rng.normal(size=(rows, width)) * 3, 0)
    x = np.where(x == 0, rng.uniform(-30, 30, (rows, width)), x)
    flat = x.reshape(-1)
    flat[: len(EDGES)] = EDGES[: flat.size]
    if dtype != "float16" and flat.size > 20:
        flat[14:18] = (1e4, -1e4, 1e15, -1e15)
    return rng.permutation(flat).reshape(rows, width)


def kinds(target: Target, seed: int) -> Evidence:
    rng, bench = rng_of("ops.activation.kinds", seed), Bench(target)
    for rows, width in ((1, 1), (37, 65)):
        for kind in oracle.KINDS:
            x = bench.round(arguments(rng, rows, width, target.dtype))
            (out,) = bench.op("activation", [Activation(x)], kind)
            bench.judge(
                "activation",
                out,
                oracle.activation(x, kind),
                oracle.noise_activation(x, kind, ratio=bench.ratio),
                where=kind,
                axes=("token", "channel"),
            )
    return bench.done()


def _gated_inputs(rng: np.random.Generator, rows: int, width: int, dtype: str) -> Any:
    """The gate from everywhere, the other half in the regimes of activations."""
    gate = np.clip(arguments(rng, rows, width, dtype), -240, 240)
    up = np.clip(regimes(rng, rows, width, dtype), -200, 200)
    return np.concatenate((gate, up), -1)


def _gated(case_id: str, op: str, kind: str, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(case_id, seed), Bench(target)
    for rows, width in SIZES:
        for _ in range(2):
            x = bench.round(_gated_inputs(rng, rows, width, target.dtype))
            (out,) = bench.op(op, [Activation(x)])
            _judge_gated(bench, op, out, x, kind, f"{rows} x {2 * width}")
    return bench.done()


def _judge_gated(bench: Bench, op: str, out: Any, x: Any, kind: str, where: str) -> None:
    exact, noise = oracle.gated(x, kind), oracle.noise_gated(x, kind, ratio=bench.ratio)
    bench.judge(op, out, exact, noise, where=where, axes=("token", "channel"))


def silu(target: Target, seed: int) -> Evidence:
    return _gated("ops.silu_and_mul.gates", "silu_and_mul", "silu", target, seed)


def gelu(target: Target, seed: int) -> Evidence:
    return _gated("ops.gelu_and_mul.gates", "gelu_and_mul", "gelu_tanh", target, seed)


def slices(target: Target, seed: int) -> Evidence:
    """Both gated ops on columns of a wider product."""
    rng, bench = rng_of("ops.gates.slices", seed), Bench(target)
    tokens, width, half = 23, 16, 21
    fused = {"weight": bench.round(weight(rng, 4 * half + 5, width))}
    size = rng.permutation(np.resize([0.3, 3.0, 60.0], tokens))[:, None]  # some gates are huge
    x = bench.round(rng.normal(size=(tokens, width)) * size)

    def fn(ops: Ops, x: Any, fused: Any) -> tuple[Any, ...]:
        both = ops.linear(x, fused)
        one, two = both[:, 3 : 3 + 2 * half], both[:, 5 + 2 * half :]
        return both, ops.silu_and_mul(one), ops.gelu_and_mul(two), ops.activation(one, "relu")

    args = [Activation(x), Weights("linear", fused)]
    both, one, two, relu = bench.call("gates of slices", fn, args)
    both = wide(both)
    left, right = both[:, 3 : 3 + 2 * half], both[:, 5 + 2 * half :]
    _judge_gated(bench, "silu_and_mul", one, left, "silu", "of columns of a product")
    _judge_gated(bench, "gelu_and_mul", two, right, "gelu_tanh", "of columns of a product")
    bench.equal(relu, oracle.activation(left, "relu"), "relu of columns of a product")
    return bench.done()


_CORE, _SMOKE = frozenset({"core"}), frozenset({"core", "smoke"})

CASES: tuple[Case, ...] = (
    Case(
        "ops.activation.kinds",
        "computes relu, gelu, gelu_tanh and silu, far out on both sides too",
        kinds,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.silu_and_mul.gates",
        "multiplies silu of the first half with the second, also where exp overflows",
        silu,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.gelu_and_mul.gates",
        "multiplies gelu_tanh of the first half with the second",
        gelu,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.gates.slices",
        "gates columns of a wider product where they lie",
        slices,
        _CORE,
        every_dtype=True,
    ),
)
