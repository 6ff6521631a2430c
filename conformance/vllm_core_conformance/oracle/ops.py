"""What every op of models computes, in float64, and the noise of honest arithmetic at each element.

`noise_*` gives n in units of the result's roundoff u: its own rounding, and `ratio` (u32 / u) times
what float32 arithmetic on the way may lose in any order of summation. `ops_scalar` says the same as
the laws here in loops; the suite's tests hold the two together.

Knows: the contract of each op. Does not know: devices, Params, limits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

FLUSHED = 2.0**-102
"""Times u32 this is 2^-126: what an operand may lose that a device takes for 0."""


# ---------------------------------------------------------------- sums of products
def times(a: Numbers, b: Numbers) -> Numbers:
    """[n, k], [m, k] -> [n, m]: a @ b.T without a matrix library, whose threads would fight with
    the backend's (ten times slower on a busy machine)."""
    return np.asarray(np.einsum("nk,mk->nm", a, b))


def linear(x: Numbers, weight: Numbers, bias: Numbers | None = None) -> Numbers:
    out = times(x, weight)
    return np.asarray(out if bias is None else out + bias)


def noise_linear(
    x: Numbers, weight: Numbers, bias: Numbers | None = None, *, ratio: float
) -> Numbers:
    """|c| + |bias| + ratio sqrt(k) sqrt(sum a^2 b^2)."""
    n = np.abs(linear(x, weight, bias)) + ratio * noise_sum(x, weight)
    return np.asarray(n if bias is None else n + np.abs(bias))


SIXTEEN_BITS = 128
"""2^-17 in units of u32."""


def noise_logits(
    x: Numbers, weight: Numbers, bias: Numbers | None = None, *, is_16_bit: bool
) -> Numbers:
    """In units of u32. A model of 16 bits may keep a logit as the sum of two 16-bit numbers, which
    holds 16 bits of the float32: its own operands have 8 or 11, and a logit of 30 is then off by
    2e-4, while rounding it to bfloat16 or float16 shows 256 or 32 times that."""
    n = noise_linear(x, weight, bias, ratio=1.0)
    if is_16_bit:
        n = n + (SIXTEEN_BITS - 1) * np.abs(linear(x, weight, bias))
    return n


def noise_sum(x: Numbers, weight: Numbers) -> Numbers:
    """Of a float32 sum in any order: sqrt(k) sqrt(sum a^2 b^2), and what may be flushed."""
    spread = np.sqrt(x.shape[-1] * times(x * x, weight * weight))
    lost = np.abs(weight).sum(-1) + np.abs(x).sum(-1, keepdims=True)
    return np.asarray(spread + FLUSHED * lost)


# ---------------------------------------------------------------- norms, over the last axis
def rms_norm(x: Numbers, weight: Numbers, eps: float) -> Numbers:
    return np.asarray(x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight)


def noise_rms_norm(x: Numbers, weight: Numbers, eps: float, *, ratio: float) -> Numbers:
    """|y| and float32's share: a sum of k squares may run one after the other."""
    y = np.abs(rms_norm(x, weight, eps))
    scale = np.abs(weight) / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    drift = 1 + math.sqrt(x.shape[-1]) / 6
    return np.asarray(y * (1 + ratio * drift) + ratio * FLUSHED * scale)


def add_rms_norm(
    x: Numbers, residual: Numbers, weight: Numbers, eps: float
) -> tuple[Numbers, Numbers]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def noise_add_rms_norm(
    x: Numbers, residual: Numbers, weight: Numbers, eps: float, *, ratio: float
) -> tuple[Numbers, Numbers]:
    """The sum may be rounded before it is normed, or after."""
    total = x + residual
    n = noise_rms_norm(total, weight, eps, ratio=ratio)
    return n + np.abs(rms_norm(total, weight, eps)), np.abs(total)


def layer_norm(x: Numbers, weight: Numbers, bias: Numbers | None, eps: float) -> Numbers:
    centred = x - np.mean(x, -1, keepdims=True)
    out = centred / np.sqrt(np.mean(centred * centred, -1, keepdims=True) + eps) * weight
    return np.asarray(out if bias is None else out + bias)


def noise_layer_norm(
    x: Numbers, weight: Numbers, bias: Numbers | None, eps: float, *, ratio: float
) -> Numbers:
    """|y| + |bias|; the mean is subtracted in float32, which costs its own size."""
    bare = np.abs(layer_norm(x, weight, None, eps))
    scale = np.abs(weight) / np.sqrt(np.var(x, -1, keepdims=True) + eps)
    root = math.sqrt(x.shape[-1])
    size = np.mean(np.abs(x), -1, keepdims=True) * (1 + root / 3)
    n = np.abs(layer_norm(x, weight, bias, eps)) + ratio * bare * (1 + root / 6)
    n = n + ratio * scale * (size + FLUSHED)
    return np.asarray(n if bias is None else n + np.abs(bias))


# ---------------------------------------------------------------- rotary embedding
def rope_table(
    positions: Numbers, inverse_frequency: Numbers, scale: float
) -> tuple[Numbers, Numbers]:
    """The angle is a float32 product of float32 numbers, as the contract says."""
    product = positions.astype(np.float32)[:, None] * inverse_frequency.astype(np.float32)
    angle = product.astype(np.float64)
    factor = float(np.float32(scale))
    return np.cos(angle) * factor, np.sin(angle) * factor


def noise_rope_table(
    positions: Numbers, inverse_frequency: Numbers, scale: float
) -> tuple[Numbers, Numbers]:
    n = np.full((len(positions), len(inverse_frequency)), scale)
    return n, n


def rope(x: Numbers, cos: Numbers, sin: Numbers) -> Numbers:
    """x [T, heads, D]; cos, sin [T, half]: pairs (i, i + half), the rest of D stays."""
    half = cos.shape[-1]
    c, s = cos[:, None], sin[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((a * c - b * s, b * c + a * s, rest), -1)


def noise_rope(x: Numbers, cos: Numbers, sin: Numbers, *, ratio: float = 1.0) -> Numbers:
    half, x = cos.shape[-1], np.abs(x)
    c, s = np.abs(cos)[:, None], np.abs(sin)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = np.concatenate((a * c + b * s, b * c + a * s), -1)
    return np.concatenate((turned + ratio * FLUSHED, x[..., 2 * half :]), -1)


# ---------------------------------------------------------------- activations
_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_TANH = math.sqrt(2 / math.pi)
KINDS = ("relu", "gelu", "gelu_tanh", "silu")


def _logistic(x: Numbers) -> Numbers:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def activation(x: Numbers, kind: str) -> Numbers:
    if kind == "relu":
        return np.where(x > 0, x, 0.0)
    if kind == "silu":
        return x * _logistic(x)
    if kind == "gelu":
        return np.asarray(0.5 * x * _erfc(-x / math.sqrt(2)))
    if kind == "gelu_tanh":  # (1 + tanh y) / 2 is the logistic function of 2 y
        return x * _logistic(2 * _TANH * (x + 0.044715 * x**3))
    raise ValueError(kind)


def _slope(x: Numbers, kind: str) -> Numbers:
    if kind == "relu":
        return (x > 0) * 1.0
    if kind == "silu":
        s = _logistic(x)
        return np.asarray(s + x * s * (1 - s))
    if kind == "gelu":
        with np.errstate(under="ignore"):
            density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return np.asarray(0.5 * _erfc(-x / math.sqrt(2)) + x * density)
    s = _logistic(2 * _TANH * (x + 0.044715 * x**3))
    return np.asarray(s + x * s * (1 - s) * 2 * _TANH * (1 + 3 * 0.044715 * x * x))


def noise_activation(x: Numbers, kind: str, *, ratio: float) -> Numbers:
    """|f| + ratio (|f| + |x f'|); for gelu also ratio 2 |x|: 1 + erf cancels below 0, and common
    approximations of erf and tanh in float32 are off by 5e-7 there."""
    y = np.abs(activation(x, kind))
    n = y * (1 + ratio) + ratio * np.abs(x * _slope(x, kind))
    if kind.startswith("gelu"):
        n = n + ratio * 2 * np.abs(x)
    return np.asarray(n + ratio * FLUSHED * (1 + np.abs(x)))


def gated(x: Numbers, kind: str) -> Numbers:
    """[T, 2F] -> [T, F]"""
    half = x.shape[-1] // 2
    return activation(x[..., :half], kind) * x[..., half:]


def noise_gated(x: Numbers, kind: str, *, ratio: float) -> Numbers:
    half = x.shape[-1] // 2
    gate, up = x[..., :half], np.abs(x[..., half:])
    lost = ratio * FLUSHED * np.abs(activation(gate, kind))  # an `up` that is flushed
    return noise_activation(gate, kind, ratio=ratio) * up + lost


def gated_linear(x: Numbers, weight: Numbers, bias: Numbers | None, kind: str) -> Numbers:
    return gated(linear(x, weight, bias), kind)


def noise_gated_linear(
    x: Numbers, weight: Numbers, bias: Numbers | None, kind: str, *, ratio: float
) -> Numbers:
    """That of the gate, and of its two arguments, which may have been rounded before."""
    noise = noise_linear(x, weight, bias, ratio=ratio)
    return noise_gated_of(linear(x, weight, bias), noise, kind, ratio=ratio)


def noise_gated_of(both: Numbers, noise: Numbers, kind: str, *, ratio: float) -> Numbers:
    """Of the gate of a product with such noise."""
    half = both.shape[-1] // 2
    of_gate = np.abs(_slope(both[..., :half], kind) * both[..., half:]) * noise[..., :half]
    of_up = np.abs(activation(both[..., :half], kind)) * noise[..., half:]
    return np.asarray(noise_gated(both, kind, ratio=ratio) + of_gate + of_up)


# ---------------------------------------------------------------- mixture of experts
def moe_route(
    logits: Numbers, top_k: int, renormalize: bool, valid: Numbers
) -> tuple[Numbers, Numbers]:
    num_experts = logits.shape[-1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.lexsort((np.broadcast_to(np.arange(num_experts), p.shape), -logits), axis=-1)
    ids = order[:, :top_k]
    weights = np.take_along_axis(p, ids, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return (
        np.where(valid[:, None], ids, num_experts).astype(np.int32),
        np.where(valid[:, None], weights, 0.0),
    )


def noise_moe_route(logits: Numbers, weights: Numbers) -> Numbers:
    return np.asarray(weights * (1 + np.ptp(logits, -1, keepdims=True)))


def moe_experts(
    x: Numbers, ids: Numbers, shares: Numbers, gate_up: Numbers, down: Numbers
) -> Numbers:
    out = np.zeros((len(x), down.shape[1]))
    for expert in range(len(down)):
        token, place = np.nonzero(ids == expert)
        y = times(gated(times(x[token], gate_up[expert]), "silu"), down[expert])
        np.add.at(out, token, shares[token, place, None] * y)
    return out


def noise_moe_experts(
    x: Numbers, ids: Numbers, shares: Numbers, gate_up: Numbers, down: Numbers, *, ratio: float
) -> Numbers:
    """Of both sums, and of gate, up and hidden values rounded to the model's dtype between them."""
    n = np.zeros((len(x), down.shape[1]))
    half = gate_up.shape[1] // 2
    for expert in range(len(down)):
        token, place = np.nonzero(ids == expert)
        if not len(token):
            continue
        rows, w1, w2 = x[token], gate_up[expert], down[expert]
        both = times(rows, w1)
        error = np.abs(both) + ratio * noise_sum(rows, w1)
        gate, up = both[:, :half], both[:, half:]
        hidden = gated(both, "silu")
        spread = np.abs(hidden) + np.abs(activation(gate, "silu")) * error[:, half:]
        spread = spread + np.abs(_slope(gate, "silu") * up) * error[:, :half]
        own = np.abs(times(hidden, w2)) + ratio * noise_sum(hidden, w2)
        own = own + np.sqrt(times(spread**2, w2**2))
        np.add.at(n, token, np.abs(shares[token, place, None]) * own)
    return n


# ---------------------------------------------------------------- log-probabilities
def logprobs(
    logits: Numbers, targets: Numbers, count: int
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """(ids [R, 1+count], values, rank [R], noise of the values); ties in order of id."""
    best = logits.max(-1, keepdims=True)
    with np.errstate(under="ignore"):
        lse = np.log(np.exp(logits - best).sum(-1, keepdims=True)) + best
    rows = np.arange(len(logits))[:, None]
    own = logits[rows, targets[:, None]]
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    ids = np.concatenate((targets[:, None], order), -1)
    x = logits[rows, ids]
    finite = np.where(np.isfinite(x), np.abs(x), 0)
    rank = 1 + (logits > own).sum(-1)
    return ids, x - lse, rank, 1 + finite + np.abs(lse)
