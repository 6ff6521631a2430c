"""Cases: a token's result is its own. NaN and Inf in other tokens of the step reach no neighbour.

Knows: ops that work row by row. Does not know: any backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence, Failed
from vllm_core_conformance.cases.ops_call import Activation, Bench, Fixed, Weights, rng_of, weight
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

TOKENS, WIDTH, INNER, EXPERTS, TOP_K, HALF = 13, 48, 24, 5, 2, 8
EPS = 1e-5


def _program(ops: Ops, x: Any, ids: Any, shares: Any, cos: Any, sin: Any, *p: Any) -> Any:
    square, norm, layer, gate_up, down, router, valid = p
    heads = x.reshape(TOKENS, 3, WIDTH // 3)
    normed, total = ops.add_rms_norm(x, x, norm, EPS)
    return (
        ops.linear(x, square),
        ops.logits(x, square),
        ops.rms_norm(x, norm, EPS),
        normed,
        total,
        ops.layer_norm(x, layer, EPS),
        ops.rope(heads, cos, sin).reshape(TOKENS, WIDTH),
        ops.silu_and_mul(x),
        ops.gelu_and_mul(x),
        ops.activation(x, "gelu"),
        ops.moe_experts(x, ids, shares, gate_up, down),
        *ops.moe_route(router, TOP_K, False, valid),
    )


NAMES = (
    "linear logits rms_norm add_rms_norm residual_sum layer_norm rope silu_and_mul gelu_and_mul "
    "activation moe_experts"
).split()


def poison(target: Target, seed: int) -> Evidence:
    """Rows of NaN, of Inf and with a single NaN stand among sound ones."""
    rng, bench = rng_of("ops.rows.poison", seed), Bench(target)
    bad = rng.permutation(TOKENS)[:4]
    x = bench.round(rng.normal(size=(TOKENS, WIDTH)))
    x[bad[0]], x[bad[1]] = np.nan, np.inf
    x[bad[2], rng.integers(WIDTH)] = np.nan
    x[bad[3], rng.integers(WIDTH)] = -np.inf
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
    shares = rng.dirichlet(np.ones(TOP_K), TOKENS).astype(np.float32)
    ids[bad[2:]], shares[bad[2:]] = EXPERTS, 0  # as padding is
    angle = rng.uniform(0, 6, (TOKENS, HALF))
    cos, sin = (f(angle).astype(np.float32) for f in (np.cos, np.sin))
    square, gate_up, down = (
        bench.round(weight(rng, *shape))
        for shape in ((65, WIDTH), (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER))
    )
    scale, offset = (bench.round(1 + rng.normal(size=WIDTH) / 3) for _ in range(2))
    args = [
        Activation(x),
        *(Fixed(v) for v in (ids, shares, cos, sin)),
        Weights("linear", {"weight": square}),
        Weights("norm", {"weight": scale}),
        Weights("norm", {"weight": scale, "bias": offset}),
        Weights("experts", {"weight": gate_up}),
        Weights("experts", {"weight": down}),
    ]
    good = np.setdiff1d(np.arange(TOKENS), bad)
    router = bench.round(np.round(rng.normal(size=(TOKENS, EXPERTS)) * 2) / 2)  # many tie
    router[good[0]], router[bad[:2]], router[bad[2:], 0] = 1.0, np.nan, np.inf
    valid = ~np.isin(np.arange(TOKENS), [*bad[2:], good[-1]])
    *found, chosen, weights = bench.call(
        "rows of poison", _program, [*args, Activation(router), Fixed(valid)]
    )
    _judge_route(bench, chosen, weights, router, valid, good)
    y, r = x[good], bench.ratio
    summed = oracle.add_rms_norm(y, y, scale, EPS)
    summed_noise = oracle.noise_add_rms_norm(y, y, scale, EPS, ratio=r)
    heads = y.reshape(len(good), 3, -1)
    turn = cos[good].astype(np.float64), sin[good].astype(np.float64)
    routed = y, ids[good], wide(shares)[good], gate_up, down
    exact = (
        (oracle.linear(y, square), oracle.noise_linear(y, square, ratio=r)),
        (oracle.linear(y, square), oracle.noise_logits(y, square, is_16_bit=bench.is_16_bit)),
        (oracle.rms_norm(y, scale, EPS), oracle.noise_rms_norm(y, scale, EPS, ratio=r)),
        (summed[0], summed_noise[0]),
        (summed[1], summed_noise[1]),
        (
            oracle.layer_norm(y, scale, offset, EPS),
            oracle.noise_layer_norm(y, scale, offset, EPS, ratio=r),
        ),
        tuple(
            v.reshape(len(good), WIDTH)
            for v in (oracle.rope(heads, *turn), oracle.noise_rope(heads, *turn, ratio=r))
        ),
        (oracle.gated(y, "silu"), oracle.noise_gated(y, "silu", ratio=r)),
        (oracle.gated(y, "gelu_tanh"), oracle.noise_gated(y, "gelu_tanh", ratio=r)),
        (oracle.activation(y, "gelu"), oracle.noise_activation(y, "gelu", ratio=r)),
        (oracle.moe_experts(*routed), oracle.noise_moe_experts(*routed, ratio=r)),
    )
    for name, out, (want, noise) in zip(NAMES, found, exact, strict=True):
        _judge(bench, name, out, good, want, noise)
    return bench.done()


def _judge_route(
    bench: Bench, chosen: Any, weights: Any, router: Any, valid: Any, good: Any
) -> None:
    ids, shares = oracle.moe_route(router[good], TOP_K, False, valid[good])
    what = "moe_route of sound tokens beside broken ones and padding"
    bench.equal(np.asarray(chosen)[good], ids, what, axes=("sound token", "choice"))
    noise = oracle.noise_moe_route(router[good], shares)
    _judge(bench, "moe_route", weights, good, shares, noise)


def _judge(bench: Bench, name: str, out: Any, good: Any, want: Any, noise: Any) -> None:
    kept = np.asarray(out)[good]
    leaked = ~np.isfinite(wide(kept)).all(-1)
    if leaked.any():
        token = int(good[np.argmax(leaked)])
        raise Failed(
            f"{name}: NaN or Inf of another token reached token {token}, whose inputs are finite; "
            "rows must not mix",
            token=token,
            tokens=good[leaked].tolist(),
        )
    bench.judge(
        "logits/16" if name == "logits" and bench.is_16_bit else name,
        kept,
        want,
        noise,
        where="of sound tokens beside broken ones",
        axes=("sound token", "channel"),
        single=name in ("logits", "moe_route"),
        by_class=name in ("linear", "logits", "moe_experts"),
    )


CASES: tuple[Case, ...] = (
    Case(
        "ops.rows.poison",
        "keeps NaN and Inf of one token away from every other",
        poison,
        frozenset({"core", "smoke"}),
        every_dtype=True,
    ),
)
