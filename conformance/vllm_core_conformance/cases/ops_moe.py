"""Cases: routing to experts, and the experts.

Knows: ties, padding, lonely and crowded experts. Does not know: any backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases.ops_call import Activation, Bench, Fixed, Weights, rng_of, weight
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

ROUTES = (
    # tokens, experts, top_k, renormalize
    (1, 1, 1, True),
    (33, 60, 4, True),
    (33, 60, 4, False),
    (130, 7, 7, False),
    (9, 8, 8, True),
    (130, 128, 8, True),
)


def _router_logits(rng: np.random.Generator, tokens: int, experts: int) -> Any:
    """Full mantissas, none near another; or in steps of 1/8 within +-12, many of which tie. Some
    stand above 88, where exp overflows."""
    grid = np.stack([rng.permutation(experts) for _ in range(tokens)]) * (24 / max(experts, 24))
    x = grid + rng.uniform(-0.05, 0.05, grid.shape) - 12
    steps = np.clip(np.round(rng.normal(size=(tokens, experts)) * 32) / 8, -12, 12)
    x[::2] = steps[::2]
    x[1::4] = np.round(x[1::4] / 4)
    x[2::8] = rng.integers(-3, 3)  # all tie
    x[4::9] += rng.choice([104, -150])
    return x


def route(target: Target, seed: int) -> Evidence:
    rng, bench = rng_of("ops.moe_route.ties", seed), Bench(target)
    for tokens, experts, top_k, renormalize in ROUTES:
        for _ in range(2):
            logits = bench.round(_router_logits(rng, tokens, experts))
            valid = np.arange(tokens) < max(1, tokens - 3)
            args = [Activation(logits), Fixed(valid)]

            def fn(
                ops: Any, x: Any, valid: Any, k: int = top_k, norm: bool = renormalize
            ) -> tuple[Any, ...]:
                found: tuple[Any, ...] = ops.moe_route(x, k, norm, valid)
                return found

            ids, shares = bench.call(("moe_route", top_k, renormalize), fn, args)
            want_ids, want = oracle.moe_route(logits, top_k, renormalize, valid)
            where = f"{top_k} of {experts} experts, {'' if renormalize else 'not '}renormalised"
            require(
                ids.dtype.name == "int32", f"moe_route: ids are {ids.dtype.name}, promised is int32"
            )
            bench.equal(ids, want_ids, f"moe_route, experts, {where}", axes=("token", "choice"))
            noise = oracle.noise_moe_route(logits, want)
            bench.judge(
                "moe_route",
                shares,
                want,
                noise,
                where=where,
                axes=("token", "choice"),
                single=True,
            )
            off = wide(shares)[~valid]
            bench.equal(off, np.zeros_like(off), "moe_route, shares of padding tokens")
    return bench.done()


@dataclass(frozen=True)
class Crowd:
    """Sizes of one call of the experts."""

    tokens: int
    width: int
    inner: int
    experts: int
    top_k: int


SPREAD = (
    Crowd(1, 3, 1, 1, 1),
    Crowd(1, 24, 17, 5, 2),
    Crowd(9, 24, 17, 5, 2),
    Crowd(33, 64, 48, 12, 4),
    Crowd(130, 16, 9, 3, 2),
)
CROWDED = Crowd(130, 40, 33, 12, 3)
ALONE = replace(CROWDED, tokens=1)


def _experts(
    bench: Bench, rng: np.random.Generator, crowd: Crowd, ids: Any, num_padding: int, where: str
) -> None:
    """The last `num_padding` tokens go nowhere; their inputs are large, NaN or Inf."""
    x = rng.normal(size=(crowd.tokens, crowd.width)) * rng.choice([0.1, 1, 4], (crowd.tokens, 1))
    shares = rng.dirichlet(np.ones(crowd.top_k) * 2, crowd.tokens).astype(np.float32)
    shares[::3] *= np.float32(0.37)  # not every router renormalises
    live = crowd.tokens - num_padding
    broken = np.array([1e4, np.nan, np.inf])[rng.integers(0, 3, num_padding), None]
    ids[live:], shares[live:], x[live:] = crowd.experts, 0, broken
    x = bench.round(x)
    w1 = bench.round(weight(rng, crowd.experts, 2 * crowd.inner, crowd.width))
    w2 = bench.round(weight(rng, crowd.experts, crowd.width, crowd.inner))
    params = Weights("experts", {"weight": w1}), Weights("experts", {"weight": w2})
    args = [Activation(x), Fixed(ids.astype(np.int32)), Fixed(shares), *params]
    (out,) = bench.op("moe_experts", args)
    given = x, ids, wide(shares), w1, w2
    exact, noise = oracle.moe_experts(*given), oracle.noise_moe_experts(*given, ratio=bench.ratio)
    padding = out[live:]
    bench.equal(
        padding,
        np.zeros(padding.shape),
        f"moe_experts, {where}: tokens that go to expert {crowd.experts}, which does not exist",
        axes=("padding token", "channel"),
    )
    bench.judge(
        "moe_experts",
        out,
        exact,
        noise,
        where=where,
        axes=("token", "channel"),
        by_class=True,
    )


def spread(target: Target, seed: int) -> Evidence:
    """Some experts get no token, and each token's experts are in any order."""
    rng, bench = rng_of("ops.moe_experts.spread", seed), Bench(target)
    for crowd in SPREAD:
        for _ in range(2):
            used = rng.permutation(crowd.experts)[: max(crowd.top_k, crowd.experts - 2)]
            ids = np.stack([rng.permutation(used)[: crowd.top_k] for _ in range(crowd.tokens)])
            where = f"{crowd.top_k} of {crowd.experts}, {len(used)} of them used"
            _experts(bench, rng, crowd, ids, crowd.tokens // 4, where)
    return bench.done()


def crowded(target: Target, seed: int) -> Evidence:
    """Every token has the same first expert: more tokens than any tile."""
    rng, bench = rng_of("ops.moe_experts.crowded", seed), Bench(target)
    for turn in range(2):
        popular = int(rng.integers(CROWDED.experts))
        others = np.delete(np.arange(CROWDED.experts), popular)
        rest = [rng.permutation(others)[: CROWDED.top_k - 1] for _ in range(CROWDED.tokens)]
        if not turn:
            rest = [others[1 - CROWDED.top_k :]] * CROWDED.tokens
        ids = np.concatenate((np.full((CROWDED.tokens, 1), popular), rest), 1)
        if turn:
            ids = rng.permuted(ids, axis=1)
        _experts(bench, rng, CROWDED, ids, 2, f"all {CROWDED.tokens} tokens to expert {popular}")
        _experts(bench, rng, ALONE, ids[:1].copy(), 0, "one token alone")
    return bench.done()


_CORE, _SMOKE = frozenset({"core"}), frozenset({"core", "smoke"})

CASES: tuple[Case, ...] = (
    Case(
        "ops.moe_route.ties",
        "routes to the k likeliest experts, ties to the lowest id, padding to none",
        route,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.moe_experts.spread",
        "adds each token's experts by their shares; unused experts and padding add nothing",
        spread,
        _SMOKE,
        every_dtype=True,
    ),
    Case(
        "ops.moe_experts.crowded",
        "serves one expert that every token asks for",
        crowded,
        _CORE,
        every_dtype=True,
    ),
)
