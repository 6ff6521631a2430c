"""Wrong activations, alone and gated.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_core.ops import reference
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    flat_memory,
    ops,
)


def _halves(x: Numbers) -> tuple[Numbers, Numbers]:
    half = x.shape[-1] // 2
    return x[:, :half], x[:, half:]


def _gated(act: Method) -> Method:
    def wrong(base: Method | None, x: Numbers) -> Numbers:
        gate, up = _halves(x)
        return np.asarray(act(gate) * up).astype(x.dtype)

    return wrong


def _gated_linear(act: Callable[[Numbers, Numbers], Any]) -> Method:
    """A fused product with an activation of its own over (gate, up)."""

    def wrong(base: Method, x: Numbers, param: Any, kind: str) -> Numbers:
        both = reference.linear(x, param["weight"], param.get("bias"))
        return np.asarray(act(*_halves(both))).astype(x.dtype)

    return wrong


def _even_odd(gate_up: Numbers) -> Numbers:
    return np.concatenate((gate_up[:, ::2], gate_up[:, 1::2]), -1)


def _silu(x: Numbers) -> Any:
    return x / (1 + np.exp(-x))


def _silu_rough(x: Numbers) -> Any:
    return x * (0.5 * np.tanh(np.clip(0.5 * x, -4.97, 4.97)) + 0.5) * (1 + 1e-3 * np.sin(x))


def _silu_in_place(base: Method, x: Numbers) -> Numbers:
    gate, up = _halves(x)
    gate[:] = _silu(gate) * up
    return gate.copy()


def _kind(kind: str, act: Method) -> Open:
    def wrong(base: Method, x: Numbers, asked: str) -> Numbers:
        return np.asarray(act(x)).astype(x.dtype) if asked == kind else np.asarray(base(x, asked))

    return ops(activation=wrong)


def _gelu_erf(x: Numbers) -> Any:
    return reference.activation(x, "gelu")


def _gelu_tanh(x: Numbers) -> Any:
    return reference.activation(x, "gelu_tanh")


def _quick_gelu(x: Numbers) -> Any:
    return x / (1 + np.exp(-1.702 * x))


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "ops", says, open_wrong, worst)


FAULTS = (
    _wrong("silu_rough", "silu is good to 1e-3 only", ops(silu_and_mul=_gated(_silu_rough))),
    _wrong(
        "silu_hard",
        "silu is the piecewise linear hard swish",
        ops(silu_and_mul=_gated(lambda x: x * np.clip(x / 6 + 0.5, 0, 1))),
    ),
    _wrong(
        "silu_overflow",
        "silu is x e^x / (1 + e^x), NaN for large x",
        ops(silu_and_mul=_gated(lambda x: x * np.exp(x) / (1 + np.exp(x)))),
        worst=True,
    ),
    _wrong(
        "silu_clamped",
        "silu_and_mul clamps its inputs at 7, as one family of models wants",
        ops(silu_and_mul=lambda base, x: base(np.clip(x, -np.inf, 7).astype(x.dtype))),
    ),
    _wrong(
        "silu_flat_tail",
        "silu is 0 below -16",
        ops(silu_and_mul=_gated(lambda x: np.where(x < -16, 0, _silu(x)))),
    ),
    _wrong(
        "silu_halves_swapped",
        "silu_and_mul gates with the second half",
        ops(silu_and_mul=lambda base, x: base(np.concatenate(_halves(x)[::-1], -1))),
    ),
    _wrong(
        "silu_interleaved",
        "silu_and_mul takes even columns as gate and odd ones as up",
        ops(silu_and_mul=lambda base, x: base(np.concatenate((x[:, ::2], x[:, 1::2]), -1))),
    ),
    _wrong("silu_in_place", "silu_and_mul overwrites its input", ops(silu_and_mul=_silu_in_place)),
    _wrong("silu_flat_memory", "silu_and_mul ignores strides", ops(silu_and_mul=flat_memory)),
    _wrong(
        "gated_linear_halves_swapped",
        "the fused product takes the second half for the gate",
        ops(gated_linear=_gated_linear(lambda gate, up: _silu(up) * gate)),
    ),
    _wrong(
        "gated_linear_always_silu",
        "the fused product knows silu only",
        ops(gated_linear=_gated_linear(lambda gate, up: _silu(gate) * up)),
    ),
    _wrong(
        "gated_linear_interleaved",
        "the fused product takes gate and up for neighbours",
        ops(
            gated_linear=_gated_linear(
                lambda gate, up: _gated(_silu)(None, _even_odd(np.concatenate((gate, up), -1)))
            )
        ),
    ),
    _wrong("gelu_gate_erf", "gelu_and_mul uses erf", ops(gelu_and_mul=_gated(_gelu_erf))),
    _wrong("gelu_is_tanh", 'activation "gelu" uses tanh', _kind("gelu", _gelu_tanh)),
    _wrong("gelu_tanh_is_erf", 'activation "gelu_tanh" uses erf', _kind("gelu_tanh", _gelu_erf)),
    _wrong("gelu_quick", 'activation "gelu" is x sigmoid(1.702 x)', _kind("gelu", _quick_gelu)),
    _wrong(
        "gelu_flat_tail",
        "gelu_tanh is 0 below -3.5",
        _kind("gelu_tanh", lambda x: np.where(x < -3.5, 0, _gelu_tanh(x))),
    ),
    _wrong("relu_six", "relu stops at 6", _kind("relu", lambda x: np.clip(x, 0, 6))),
    _wrong(
        "activation_overflow",
        'activation "silu" overflows',
        _kind("silu", lambda x: x * np.exp(x) / (1 + np.exp(x))),
    ),
    _wrong(
        "activation_wide",
        "activation returns float32 in a model of 16 bits",
        ops("torch", activation=lambda base, x, kind: base(x.float(), kind)),
    ),
)
