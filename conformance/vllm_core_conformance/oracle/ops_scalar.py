"""The laws of `ops` once more, in loops over Python floats: slow, obvious, independent of it.

Knows: the contract of each op, one number at a time. Does not know: arrays, noise.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

Row = Sequence[float]
Matrix = Sequence[Row]


def linear(x: Matrix, weight: Matrix, bias: Row | None = None) -> list[list[float]]:
    return [
        [
            math.fsum(a * b for a, b in zip(row, column)) + (bias[o] if bias is not None else 0.0)
            for o, column in enumerate(weight)
        ]
        for row in x
    ]


def rms_norm(row: Row, weight: Row, eps: float) -> list[float]:
    mean = math.fsum(v * v for v in row) / len(row)
    return [v / math.sqrt(mean + eps) * w for v, w in zip(row, weight)]


def layer_norm(row: Row, weight: Row, bias: Row | None, eps: float) -> list[float]:
    mean = math.fsum(row) / len(row)
    variance = math.fsum((v - mean) ** 2 for v in row) / len(row)
    plus = bias if bias is not None else [0.0] * len(row)
    return [(v - mean) / math.sqrt(variance + eps) * w + b for v, w, b in zip(row, weight, plus)]


def single(x: float) -> float:
    """The nearest float32."""
    value: float = struct.unpack("f", struct.pack("f", x))[0]
    return value


def rope_angle(position: int, inverse_frequency: float) -> float:
    return single(single(position) * single(inverse_frequency))


def rope(head: Row, cos: Row, sin: Row) -> list[float]:
    """One head of one token."""
    half, out = len(cos), list(head)
    for i in range(half):
        a, b = head[i], head[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i] + a * sin[i]
    return out


def activation(x: float, kind: str) -> float:
    if kind == "relu":
        return max(x, 0.0)
    if kind == "silu":
        return x / (1 + math.exp(-x)) if x > 0 else x * math.exp(x) / (1 + math.exp(x))
    if kind == "gelu":
        return x * math.erfc(-x / math.sqrt(2)) / 2
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + math.tanh(inner))


def gated(row: Row, kind: str) -> list[float]:
    half = len(row) // 2
    return [activation(row[i], kind) * row[half + i] for i in range(half)]


def moe_route(
    logits: Row, top_k: int, renormalize: bool, valid: bool
) -> tuple[list[int], list[float]]:
    """One token."""
    if not valid:
        return [len(logits)] * top_k, [0.0] * top_k
    total = math.fsum(math.exp(v) for v in logits)
    order = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    shares = [math.exp(logits[e]) / total for e in order]
    if renormalize:
        kept = math.fsum(shares)
        shares = [share / kept for share in shares]
    return order, shares


def moe_experts(
    x: Row, ids: Sequence[int], shares: Row, gate_up: Sequence[Matrix], down: Sequence[Matrix]
) -> list[float]:
    """One token."""
    out = [0.0] * len(down[0])
    for expert, share in zip(ids, shares):
        if expert < len(down):
            (both,) = linear([x], gate_up[expert])
            (y,) = linear([gated(both, "silu")], down[expert])
            out = [a + share * b for a, b in zip(out, y)]
    return out


def logprob(logits: Row, token: int) -> float:
    best = max(logits)
    return logits[token] - best - math.log(math.fsum(math.exp(v - best) for v in logits))


def rank(logits: Row, token: int) -> int:
    return 1 + sum(v > logits[token] for v in logits)
