"""What a step of attention must give: float64, straight from the numeric contract of the seam.

    score(t,h,j) = scale * dot(q[t,h], K[j, h // G]);  softcap * tanh(score / softcap) if softcap
    visible(t,j): j < seq_len, pos_j <= pos_t if causal, pos_j > pos_t - window
    pos_t = seq_len - q_len + (t - query_start);  seq_len counts the tokens of this step
    lse = ln sum exp(score);  out = sum exp(score - lse') V;  lse' = ln(exp(lse) + exp(sink[h]))

Noise is first order, in units of the roundoff u of the output: |o| for its own rounding and
sqrt(sum p^2 v^2) for probabilities that are rounded before they meet V. To this comes, times u32/u,
what any float32 implementation has: the error of scores (it grows with |score|: an exponent of 300
is known to 300 u32 only) and of sums over L keys, which grows as sqrt(L).

Knows: the contract, a scene. Does not know: backends, limits, layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.score import ROUNDOFF
from vllm_core_conformance.steps import Scene, Shape

Numbers = NDArray[Any]

HALF_SMALLEST = {"float16": 2.0**-25}
"""Rounding of a subnormal probability, where the range is that short; else it is nothing."""


@dataclass(frozen=True)
class Expected:
    """Of the real tokens of a step; t tokens, float64."""

    out: Numbers
    """[t, Hq, Dv]"""
    noise: Numbers
    """[t, Hq, Dv], in units u."""
    lse: Numbers
    """[t, Hq], without the sink."""
    lse_noise: Numbers
    """[t, Hq], in units u32."""
    keys: Numbers
    """[num_blocks, layers, BT, Hkv, D]: the cache after the step; block 0 is zeros."""
    values: Numbers


@dataclass(frozen=True)
class Row:
    """One row of a step: its queries and all it may look at."""

    index: int
    begin: int
    end: int
    """Its tokens in the step."""
    first: int
    """Position of the first key that any of its queries sees."""
    length: int
    keys: Numbers
    """[length - first, Hkv, D], those of this step included."""
    values: Numbers
    visible: Numbers
    """[queries, length - first] bool"""


def score_error(dtype: str, numeric_class: str) -> float:
    """Relative rounding of one score, in units u32, that its class allows beyond float32's own.

    A: two 16-bit numbers may stand for a float32 score, an error of u^2. B: one 16-bit number. C: 8
    bits. So the limits' multipliers of B and C need not pay for what their scores are.
    """
    unit = max(ROUNDOFF[dtype], ROUNDOFF["bfloat16"]) if dtype == "float32" else ROUNDOFF[dtype]
    own = {"A": ROUNDOFF[dtype] ** 2, "B": unit, "C": 2.0**-4}[numeric_class]
    ratio = own / ROUNDOFF["float32"]
    return ratio if ratio > 1 else 0.0


def attention(scene: Scene, dtype: str, numeric_class: str = "A") -> Expected:
    """The step of the scene; dtype is that of the output, and with the class decides the noise."""
    shape = scene.shape
    t, heads, dim_v = scene.num_tokens, shape.num_q_heads, shape.dim_v or shape.dim
    out, noise = np.zeros((t, heads, dim_v)), np.zeros((t, heads, dim_v))
    lse, lse_noise = np.zeros((t, heads)), np.zeros((t, heads))
    keys, values = cache_after(scene)
    for row in rows_of(scene, keys, values):
        here = slice(row.begin, row.end)
        for kv_head in range(shape.num_kv_heads):
            group = slice(kv_head * shape.queries_per_kv, (kv_head + 1) * shape.queries_per_kv)
            found = _one_head(
                scene.q[here, group],
                row.keys[:, kv_head],
                row.values[:, kv_head],
                row.visible,
                None if scene.sinks is None else scene.sinks[group],
                shape,
                dtype,
                score_error(dtype, numeric_class),
            )
            for target, value in zip((out, noise, lse, lse_noise), found, strict=True):
                target[here, group] = value
    keys[0] = values[0] = 0.0
    return Expected(out, noise, lse, lse_noise, keys, values)


def cache_after(scene: Scene) -> tuple[Numbers, Numbers]:
    """Copies of the cache with the step's K and V at their slots, in the scene's layer only."""
    size, layer = scene.shape.block_tokens, scene.shape.layer
    keys, values = scene.keys.copy(), scene.values.copy()
    starts = scene.starts
    for i in range(len(scene.query)):
        position = np.arange(scene.cached[i], scene.seq_lens[i])
        block, slot = scene.tables[i][position // size], position % size
        here = slice(starts[i], starts[i + 1])
        keys[block, layer, slot] = scene.k[here]
        values[block, layer, slot] = scene.v[here]
    return keys, values


def rows_of(scene: Scene, keys: Numbers, values: Numbers) -> Iterator[Row]:
    """Each row of the step with what it may look at, from the cache after the step."""
    shape, starts = scene.shape, scene.starts
    size = shape.block_tokens
    for i in range(len(scene.query)):
        cached, length = int(scene.cached[i]), int(scene.seq_lens[i])
        first = 0 if shape.window is None else max(0, cached - shape.window + 1)
        j = np.arange(first, length)
        block, slot = scene.tables[i][j // size], j % size
        position = np.arange(cached, length)[:, None]
        visible = np.ones((length - cached, length - first), bool)
        if shape.causal:
            visible &= j <= position
        if shape.window is not None:
            visible &= j > position - shape.window
        yield Row(
            i,
            int(starts[i]),
            int(starts[i + 1]),
            first,
            length,
            keys[block, shape.layer, slot],
            values[block, shape.layer, slot],
            visible,
        )


def _one_head(
    q: Numbers,
    k: Numbers,
    v: Numbers,
    visible: Numbers,
    sinks: Numbers | None,
    shape: Shape,
    dtype: str,
    coarse: float,
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """q [n, G, D], k [L, D], v [L, Dv] -> out, noise [n, G, Dv], lse, lse noise [n, G]."""
    seen = visible[:, None]
    raw = np.einsum("ngd,ld->ngl", q, k, optimize=True) * shape.scale
    score, slope = raw, np.ones_like(raw)
    if shape.softcap is not None:
        bent = np.tanh(raw / shape.softcap)
        score, slope = shape.softcap * bent, 1 - bent**2
    score = np.where(seen, score, -np.inf)
    top = score.max(-1)
    lse = np.log(np.exp(score - top[..., None]).sum(-1)) + top
    if sinks is not None:
        top = np.maximum(top, sinks)
    p = np.exp(score - top[..., None])
    sink = np.zeros_like(top) if sinks is None else np.exp(sinks - top)
    total = p.sum(-1) + sink
    p, sink = p / total[..., None], sink / total
    out = np.einsum("ngl,ld->ngd", p, v, optimize=True)

    # errors of the scores, in units u32: of the products and their sum, of the exponent, of exp
    spread = np.sqrt(np.einsum("ngd,ld->ngl", q**2, k**2, optimize=True))
    dot = abs(shape.scale) * np.sqrt(shape.dim) * spread
    finite = np.where(seen, score, 0.0)
    error = 2 + np.abs(finite) + slope * (np.abs(raw) + dot)
    error += np.where(seen, np.abs(finite - top[..., None]), 0.0)
    apart = coarse * np.maximum(slope * np.abs(raw), np.abs(finite))  # independent in each

    def weighted(w: Numbers, x: Numbers) -> Numbers:
        total: Numbers = np.einsum("ngl,ld->ngd", w, x, optimize=True)
        return total

    rounded = np.sqrt(weighted(p**2, v**2))
    size = np.abs(out)
    length = np.sqrt(visible.sum(-1))[:, None, None]
    mean_error = (p * error).sum(-1)
    whole = np.log(total) + top  # lse'
    common = mean_error + 2 + np.abs(whole) + np.abs(top)
    if sinks is not None:
        common += sink * (2 + np.abs(sinks) + np.abs(sinks - top))
    mean_apart = np.sqrt((p**2 * apart**2).sum(-1))
    single = length * (rounded + size)
    single += weighted(p * error, np.abs(v)) + size * common[..., None]
    single += np.sqrt(weighted((p * apart) ** 2, v**2)) + size * mean_apart[..., None]
    noise = size + rounded + ROUNDOFF["float32"] / ROUNDOFF[dtype] * single
    if dtype in HALF_SMALLEST:
        tiny = HALF_SMALLEST[dtype] / ROUNDOFF[dtype]
        noise = noise + tiny * np.sqrt(weighted(np.broadcast_to(seen, p.shape) * 1.0, v**2))

    # lse and sinks are never asked for together
    lse_noise = 1 + np.abs(lse) + np.abs(top) + length[..., 0] + mean_error + mean_apart
    return out, noise, lse, lse_noise
