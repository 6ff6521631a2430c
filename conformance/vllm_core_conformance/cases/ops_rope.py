"""Cases: angles of the rotary embedding, and the rotation.

Knows: positions and pairs that hurt. Does not know: any backend.
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

TABLES = ((1, 1, 1e4, 1.0), (19, 24, 1e4, 1.2079), (130, 48, 5e5, 0.8333))
"""(tokens, half, base, scale)"""
SHAPES = ((1, 1, 2, 1), (7, 3, 16, 8), (9, 2, 80, 16), (33, 12, 66, 33), (130, 6, 64, 12))
"""(tokens, heads, dim, half): whole and partial rotations."""
LONGEST = 131_071


def _frequency(half: int, base: float) -> Any:
    return (base ** -(np.arange(half) / half)).astype(np.float32)


def _positions(rng: np.random.Generator, tokens: int) -> Any:
    positions = rng.integers(0, LONGEST + 1, tokens).astype(np.int32)
    positions[1::3] = rng.integers(0, 300, len(positions[1::3]))
    positions[:2] = (LONGEST, 0)[:tokens]
    return rng.permutation(positions)


def _judge_table(
    bench: Bench, found: Any, positions: Any, half: int, base: float, scale: float
) -> None:
    args = positions, _frequency(half, base), scale
    exact, noise = oracle.rope_table(*args), oracle.noise_rope_table(*args)
    for name, out, want, n in zip(("cos", "sin"), found, exact, noise):
        bench.judge(
            "rope_table",
            out,
            want,
            n,
            where=f"{name} of {len(positions)} positions, base {base:g}, scale {scale:g}",
            axes=("token", "pair"),
            single=True,
        )


def table(target: Target, seed: int) -> Evidence:
    rng, bench = rng_of("ops.rope_table.positions", seed), Bench(target)
    for tokens, half, base, scale in TABLES:
        scale = float(np.float32(scale))

        def fn(
            ops: Ops, positions: Any, half: int = half, base: float = base, scale: float = scale
        ) -> tuple[Any, ...]:
            return ops.rope_table(positions, _frequency(half, base), scale)

        for _ in range(2):
            positions = _positions(rng, tokens)
            found = bench.call(("rope_table", half, base, scale), fn, [Fixed(positions)])
            _judge_table(bench, found, positions, half, base, scale)
    return bench.done()


def _judge_rope(bench: Bench, out: Any, x: Any, cos: Any, sin: Any, where: str) -> None:
    exact = oracle.rope(x, cos, sin)
    noise = oracle.noise_rope(x, cos, sin, ratio=bench.ratio)
    bench.judge("rope", out, exact, noise, where=where, axes=("token", "head", "dim"))


def shapes(target: Target, seed: int) -> Evidence:
    rng, bench = rng_of("ops.rope.shapes", seed), Bench(target)
    for tokens, heads, dim, half in SHAPES:
        for _ in range(2):
            x = regimes(rng, tokens * heads, dim, target.dtype).reshape(tokens, heads, dim)
            x = bench.round(x)
            angle = rng.uniform(-7, 7, (tokens, half))
            size = rng.choice([1, 1.2079], (tokens, 1))
            cos, sin = ((f(angle) * size).astype(np.float32) for f in (np.cos, np.sin))
            (out,) = bench.op("rope", [Activation(x), Fixed(cos), Fixed(sin)])
            where = f"of {heads} heads of {dim}, {2 * half} of them rotating"
            _judge_rope(bench, out, x, wide(cos), wide(sin), where)
    return bench.done()


def two_tables(target: Target, seed: int) -> Evidence:
    """q and k are slices of one product; layers alternate between tables, two of them of one
    length, as models with local and global layers do."""
    rng, bench = rng_of("ops.rope.tables", seed), Bench(target)
    tokens, width, q_heads, k_heads, dim = 71, 24, 10, 2, 32
    kinds = ((16, 1e4, 1.0), (8, 1e6, float(np.float32(1.2079))), (16, 3e5, 1.0))
    q_size, size = q_heads * dim, (q_heads + k_heads) * dim
    fused = {"weight": bench.round(weight(rng, size + 5, width))}

    def fn(ops: Ops, x: Any, fused: Any, positions: Any) -> tuple[Any, ...]:
        tables = [ops.rope_table(positions, _frequency(h, b), s) for h, b, s in kinds]
        both = ops.linear(x, fused)
        q = both[:, :q_size].reshape(tokens, q_heads, dim)
        k = both[:, q_size:size].reshape(tokens, k_heads, dim)
        turned = []
        for cos, sin in (tables[1], tables[0], tables[2], tables[1]):
            turned += [ops.rope(q, cos, sin), ops.rope(k, cos, sin)]
        turned.append(ops.rope(q, tables[0][0], tables[2][1]))  # a pair that nobody made together
        return both, *(part for pair in tables for part in pair), *turned

    for _ in range(2):  # new positions, old shapes
        x = bench.round(rng.normal(size=(tokens, width)))
        positions = _positions(rng, tokens)
        args = [Activation(x), Weights("linear", fused), Fixed(positions)]
        both, *rest = bench.call("rope of two tables", fn, args)
        both = wide(both)
        q = both[:, :q_size].reshape(tokens, q_heads, dim)
        k = both[:, q_size:size].reshape(tokens, k_heads, dim)
        pairs = [rest[2 * i : 2 * i + 2] for i in range(len(kinds))]
        tables = [(wide(cos), wide(sin)) for cos, sin in pairs]
        for pair, (half, base, scale) in zip(pairs, kinds):
            _judge_table(bench, pair, positions, half, base, scale)
        _judge_rope(bench, rest[-1], q, tables[0][0], tables[2][1], "by cos and sin of two tables")
        turned = zip(rest[2 * len(kinds) : -1], (1, 1, 0, 0, 2, 2, 1, 1), strict=True)
        for place, (out, which) in enumerate(turned):
            name, head = (("q", q), ("k", k))[place % 2]
            _judge_rope(bench, out, head, *tables[which], f"of {name} by table {which} of three")
    return bench.done()


_CORE, _SMOKE = frozenset({"core"}), frozenset({"core", "smoke"})

CASES: tuple[Case, ...] = (
    Case(
        "ops.rope_table.positions",
        "computes angles in float32 up to position 131,071, scaled",
        table,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.rope.shapes",
        "rotates pairs (i, i + half) of the first dims of every head and leaves the rest",
        shapes,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.rope.tables",
        "rotates slices of one product by the table that it is given, not by the last one made",
        two_tables,
        _CORE,
        every_dtype=True,
    ),
)
