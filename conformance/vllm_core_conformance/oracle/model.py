"""A whole decoder in float64, without cache, blocks or batches: what every served token is judged
by.

`hidden` walks one sequence at once. With a `Rounding` it also walks it with errors as large as an
honest device's, which tells how far log-probabilities may be off (T2: each op's own noise).

Knows: the mathematics of a layer, first-order noise. Does not know: the seam, engines, devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
Weights = Mapping[str, Any]
""""embed", "norm", perhaps "head" and "positions": {"weight", perhaps "bias"}; "layers": a list of
such mappings. Linear weights [out, in]; qkv, gate_up and experts as the model sees them."""

HONEST = 0.4
"""Root mean square of an honest op's error in units of its noise (rounding to nearest: 0.29 to
0.58 of a unit roundoff, depending on the mantissa)."""
U32 = 2.0**-24


@dataclass(frozen=True)
class Layer:
    """Facts of one layer."""

    q_heads: int
    kv_heads: int
    dim: int
    ffn: int
    window: int | None = None
    softcap: float | None = None
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    gated: bool = True
    experts: int = 0
    """0: a plain FFN."""
    top_k: int = 0
    renormalize: bool = True
    norm: Literal["rms", "layer"] = "rms"
    rotates: bool = True
    sandwich: bool = False
    qk_norm: bool = False
    biases: bool = False
    scale: float = 0.3
    """Of the scores; on purpose not dim ** -0.5."""
    theta: float | None = None
    """Base of its rotary frequencies; None: the blueprint's."""


@dataclass(frozen=True)
class Blueprint:
    """A decoder as plain facts; hashable."""

    name: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    tied: bool = False
    embedding_scale: float = 1.0
    position_offset: int | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    eps: float = 1e-5
    max_len: int = 64
    theta: float = 100.0

    @property
    def inverse_frequency(self) -> tuple[float, ...]:
        """[dim / 2] float32 values, of the first layer."""
        return self.frequency_of(self.layers[0])

    def frequency_of(self, layer: Layer) -> tuple[float, ...]:
        """[dim / 2] float32 values."""
        half = layer.dim // 2
        exact = (layer.theta or self.theta) ** -(np.arange(half) / half)
        return tuple(float(f) for f in exact.astype(np.float32))


def times(a: Numbers, b: Numbers) -> Numbers:
    """[n, k], [m, k] -> [n, m]: a @ b.T without a matrix library, whose threads would fight with
    the backend's (ten times slower on a busy machine)."""
    found: Numbers = np.einsum("nk,mk->nm", a, b)
    return found


class Exact:
    """No errors."""

    def off(self, y: Numbers, noise: Numbers | float) -> Numbers:
        """y, as a device with this first-order noise (in its dtype's roundings) has it."""
        return y

    def linear(self, x: Numbers, weight: Numbers) -> Numbers:
        return times(x, weight)

    def table(self, y: Numbers) -> Numbers:
        """cos or sin, which are float32 in every dtype."""
        return y


class Rounding(Exact):
    """Normal errors of an honest device of unit roundoff u, seeded."""

    def __init__(self, u: float, seed: int) -> None:
        self.u, self.rng = u, np.random.default_rng(seed)

    def off(self, y: Numbers, noise: Numbers | float) -> Numbers:
        return y + HONEST * self.u * noise * self.rng.standard_normal(y.shape)

    def linear(self, x: Numbers, weight: Numbers) -> Numbers:
        y = times(x, weight)
        own = U32 if self.u >= U32 else self.u  # accumulation is in float32 or better
        spread = np.sqrt(times(np.square(x), np.square(weight)))
        return self.off(y, np.abs(y) + own / self.u * math.sqrt(x.shape[-1]) * spread)

    def table(self, y: Numbers) -> Numbers:
        return y + HONEST * U32 * self.rng.standard_normal(y.shape)


EXACT = Exact()


def hidden(
    blueprint: Blueprint, weights: Weights, tokens: Sequence[int], device: Exact = EXACT
) -> Numbers:
    """[T, H] after the final norm, of a whole sequence at once."""
    ids = np.asarray(tokens)
    x = weights["embed"]["weight"][ids]
    if blueprint.embedding_scale != 1.0:
        x = device.off(x * blueprint.embedding_scale, np.abs(x * blueprint.embedding_scale))
    if blueprint.position_offset is not None:
        x = x + weights["positions"]["weight"][np.arange(len(ids)) + blueprint.position_offset]
        x = device.off(x, np.abs(x))
    for facts, own in zip(blueprint.layers, weights["layers"], strict=True):
        x = _layer(blueprint, facts, own, x, device)
    return _norm(x, weights["norm"], blueprint.layers[0].norm, blueprint.eps, device)


def logits_of(blueprint: Blueprint, weights: Weights, found: Numbers) -> Numbers:
    """[R, H] after the final norm -> [R, V]."""
    out: Numbers = times(found, head_of(blueprint, weights)) * blueprint.logit_scale
    if blueprint.logit_softcap is not None:
        out = np.tanh(out / blueprint.logit_softcap) * blueprint.logit_softcap
    return out


def head_of(blueprint: Blueprint, weights: Weights) -> Numbers:
    """[V, H]"""
    found: Numbers = weights["embed" if blueprint.tied else "head"]["weight"]
    return found


def log_softmax(x: Numbers) -> Numbers:
    best = x.max(-1, keepdims=True)
    found: Numbers = x - best - np.log(np.exp(x - best).sum(-1, keepdims=True))
    return found


def _layer(blueprint: Blueprint, facts: Layer, own: Weights, x: Numbers, device: Exact) -> Numbers:
    eps = blueprint.eps
    h = _norm(x, own["input_norm"], facts.norm, eps, device)
    h = _attention(blueprint, facts, own, h, device)
    if facts.sandwich:
        h = _norm(h, own["post_attention_norm"], facts.norm, eps, device)
    x = device.off(x + h, np.abs(x + h))
    h = _norm(x, own["ffn_norm"], facts.norm, eps, device)
    h = _experts(facts, own, h, device) if facts.experts else _ffn(facts, own, h, device)
    if facts.sandwich:
        h = _norm(h, own["post_ffn_norm"], facts.norm, eps, device)
    return device.off(x + h, np.abs(x + h))


def _norm(x: Numbers, own: Weights, kind: str, eps: float, device: Exact) -> Numbers:
    bias = own.get("bias")
    if kind == "rms":
        y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * own["weight"]
        return device.off(y, np.abs(y))
    centred = x - np.mean(x, -1, keepdims=True)
    y = centred / np.sqrt(np.mean(centred * centred, -1, keepdims=True) + eps) * own["weight"]
    noise = np.abs(y)
    if bias is not None:
        y, noise = y + bias, noise + np.abs(bias)
    return device.off(y, noise)


def _linear(x: Numbers, own: Weights, device: Exact) -> Numbers:
    y = device.linear(x, own["weight"])
    bias = own.get("bias")
    return y if bias is None else device.off(y + bias, np.abs(bias))


def _attention(
    blueprint: Blueprint, facts: Layer, own: Weights, x: Numbers, device: Exact
) -> Numbers:
    count, (hq, hkv, dim) = len(x), (facts.q_heads, facts.kv_heads, facts.dim)
    qkv = _linear(x, own["qkv"], device)
    q = qkv[:, : hq * dim].reshape(count, hq, dim)
    k = qkv[:, hq * dim : (hq + hkv) * dim].reshape(count, hkv, dim)
    v = qkv[:, (hq + hkv) * dim :].reshape(count, hkv, dim)
    if facts.qk_norm:
        q = _norm(q, own["q_norm"], facts.norm, blueprint.eps, device)
        k = _norm(k, own["k_norm"], facts.norm, blueprint.eps, device)
    if facts.rotates:
        frequency = np.array(blueprint.frequency_of(facts), np.float32)
        angle = np.arange(count, dtype=np.float32)[:, None] * frequency  # float32 by contract
        wide = angle.astype(np.float64)[:, None]
        cos, sin = device.table(np.cos(wide)), device.table(np.sin(wide))
        q, k = _rope(q, cos, sin, device), _rope(k, cos, sin, device)
    out = np.empty((count, hq, dim))
    noise = np.empty_like(out)
    distance = np.arange(count)[:, None] - np.arange(count)[None]
    visible = distance >= 0
    if facts.window is not None:
        visible &= distance < facts.window
    for head in range(hq):
        keys, values = k[:, head // (hq // hkv)], v[:, head // (hq // hkv)]
        score = facts.scale * times(q[:, head], keys)
        if facts.softcap is not None:
            score = facts.softcap * np.tanh(score / facts.softcap)
        p = np.exp(log_softmax(np.where(visible, score, -np.inf)))
        out[:, head] = times(p, values.T)
        noise[:, head] = np.abs(out[:, head]) + np.sqrt(times(np.square(p), np.square(values).T))
    out = device.off(out, noise)
    return _linear(out.reshape(count, hq * dim), own["output"], device)


def _rope(x: Numbers, cos: Numbers, sin: Numbers, device: Exact) -> Numbers:
    a, b = np.split(x, 2, axis=-1)
    turned = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
    noise = np.concatenate(
        (np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)), -1
    )
    return device.off(turned, noise)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _activate(x: Numbers, kind: str) -> Numbers:
    if kind == "relu":
        return np.maximum(x, 0.0)
    if kind == "silu":
        return x / (1.0 + np.exp(-x))
    if kind == "gelu":
        found: Numbers = 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))
        return found
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1.0 + np.tanh(inner))


def _ffn(facts: Layer, own: Weights, x: Numbers, device: Exact) -> Numbers:
    if facts.gated:
        gate, up = np.split(_linear(x, own["gate_up"], device), 2, axis=-1)
        h = _activate(gate, facts.activation) * up
    else:
        h = _activate(_linear(x, own["up"], device), facts.activation)
    return _linear(device.off(h, np.abs(h)), own["down"], device)


def _experts(facts: Layer, own: Weights, x: Numbers, device: Exact) -> Numbers:
    router = _linear(x, own["router"], device)
    share = np.exp(log_softmax(router))
    out = np.zeros_like(x)
    for token in range(len(x)):
        chosen = np.argsort(-share[token], kind="stable")[: facts.top_k]
        total = share[token, chosen].sum() if facts.renormalize else 1.0
        for expert in chosen:
            row = x[token : token + 1]
            gate, up = np.split(device.linear(row, own["gate_up"]["weight"][expert]), 2, axis=-1)
            h = _activate(gate, "silu") * up
            h = device.linear(device.off(h, np.abs(h)), own["down"]["weight"][expert])
            out[token] += share[token, expert] / total * h[0]
    return device.off(out, np.abs(out))
