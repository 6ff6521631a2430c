"""The numpy law of every numeric op, in the dtype of its arguments (float64 arguments give the
oracle).

Knows: the mathematics. Does not know: Params, devices, speed.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_core.ops.arrays import HostArray


def wide(x: HostArray) -> HostArray:
    """At least float32: what norms and accumulations are computed in."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def linear(x: HostArray, weight: HostArray, bias: HostArray | None = None) -> HostArray:
    out = wide(x) @ wide(weight).T
    return out if bias is None else out + wide(bias)


def rms_norm(x: HostArray, weight: HostArray, eps: float) -> HostArray:
    x = wide(x)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * wide(weight)


def layer_norm(x: HostArray, weight: HostArray, bias: HostArray | None, eps: float) -> HostArray:
    x = wide(x)
    centred = x - np.mean(x, -1, keepdims=True)
    out = centred / np.sqrt(np.mean(centred * centred, -1, keepdims=True) + eps) * wide(weight)
    return out if bias is None else out + wide(bias)


def rope_table(
    positions: HostArray, inverse_frequency: HostArray, scale: float
) -> tuple[HostArray, HostArray]:
    """[T], [rotary/2] -> cos, sin [T, rotary/2] float32."""
    angle = positions.astype(np.float32)[:, None] * inverse_frequency.astype(np.float32)
    return np.cos(angle) * np.float32(scale), np.sin(angle) * np.float32(scale)


def rope(x: HostArray, cos: HostArray, sin: HostArray) -> HostArray:
    """Pairs (i, i + half) of the first 2 * half dims of x [T, heads, D]."""
    half = cos.shape[-1]
    c, s = cos[:, None], sin[:, None]
    a, b, rest = wide(x[..., :half]), wide(x[..., half : 2 * half]), wide(x[..., 2 * half :])
    return np.concatenate((a * c - b * s, b * c + a * s, rest), -1)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def activation(x: HostArray, kind: str) -> HostArray:
    x = wide(x)
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if kind == "gelu":
        return (0.5 * x * (1 + _erf(x / np.sqrt(2)))).astype(x.dtype)
    raise ValueError(f"unknown activation {kind!r}")


def moe_route(
    logits: HostArray, top_k: int, renormalize: bool, valid: HostArray
) -> tuple[HostArray, HostArray]:
    logits = wide(logits)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(p, ids, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    ids = np.where(valid[:, None], ids, logits.shape[-1]).astype(np.int32)
    return ids, np.where(valid[:, None], weights, 0)


def moe_experts(
    x: HostArray, ids: HostArray, weights: HostArray, gate_up: HostArray, down: HostArray
) -> HostArray:
    out = np.zeros((x.shape[0], down.shape[1]), wide(x).dtype)
    size = gate_up.shape[1] // 2
    for expert in range(gate_up.shape[0]):
        token, place = np.nonzero(ids == expert)
        if len(token):
            h = linear(x[token], gate_up[expert])
            h = activation(h[:, :size], "silu") * h[:, size:]
            # weights join after the down projection, as in the formula of the op
            np.add.at(out, token, weights[token, place][:, None] * linear(h, down[expert]))
    return out


def attention(
    q: HostArray,
    k: HostArray,
    v: HostArray,
    positions: HostArray,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: HostArray | None = None,
) -> tuple[HostArray, HostArray]:
    """One sequence: q [n, Hq, D], k [L, Hkv, D], v [L, Hkv, Dv], positions [n] -> out [n, Hq, Dv],
    lse [n, Hq].

    Keys at positions that a query must not see may hold anything.
    """
    n, num_heads, _ = q.shape
    length, num_kv, _ = k.shape
    j = np.arange(length)
    visible = np.ones((n, length), bool)
    if causal:
        visible &= j <= positions[:, None]
    if window is not None:
        visible &= j > positions[:, None] - window
    seen = visible.max(0, initial=False)[:, None, None]
    k, v = np.where(seen, wide(k), 0), np.where(seen, wide(v), 0)  # dead slots stay dead
    grouped = wide(q).reshape(n, num_kv, num_heads // num_kv, -1)
    score = np.einsum("nkgd,lkd->nkgl", grouped, k) * scale
    if softcap is not None:
        score = softcap * np.tanh(score / softcap)
    score = np.where(visible[:, None, None], score, -np.inf)
    top = score.max(-1, initial=-np.inf)
    if sinks is not None:
        sink = wide(sinks).reshape(1, num_kv, -1)
        top = np.maximum(top, sink)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(score - top[..., None])
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    if sinks is not None:
        total = total + np.exp(sink - top)
    out = np.einsum("nkgl,lkd->nkgd", p, v) / np.where(total > 0, total, 1)[..., None]
    return out.reshape(n, num_heads, -1), lse.reshape(n, num_heads)
