"""Wrong rotary embeddings: tables and rotation.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.backend import Runtime
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    as_bfloat16,
    ops,
    planted,
    replaced,
)


def _pairs(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Numbers:
    size = 2 * cos.shape[-1]
    a, b = x[..., 0:size:2], x[..., 1:size:2]
    out = np.array(x)
    out[..., 0:size:2] = a * cos[:, None] - b * sin[:, None]
    out[..., 1:size:2] = b * cos[:, None] + a * sin[:, None]
    return out


def _whole_head(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Numbers:
    """Pairs (i, i + D/2) also where fewer dims rotate."""
    half = cos.shape[-1]
    other = x.shape[-1] // 2
    out = np.array(x)
    a, b = x[..., :half], x[..., other : other + half]
    out[..., :half] = a * cos[:, None] - b * sin[:, None]
    out[..., other : other + half] = b * cos[:, None] + a * sin[:, None]
    return out


def _rest_lost(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Any:
    out = base(x, cos, sin)
    out[..., 2 * cos.shape[-1] :] = 0
    return out


def _overwritten(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Any:
    """In place, the second half from the new first half."""
    half = cos.shape[-1]
    out = np.array(x)
    out[..., :half] = x[..., :half] * cos[:, None] - x[..., half : 2 * half] * sin[:, None]
    out[..., half : 2 * half] = (
        x[..., half : 2 * half] * cos[:, None] + out[..., :half] * sin[:, None]
    )
    return out


def _into_input(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Any:
    x[:] = base(x, cos, sin)
    return x


def _first_heads(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Any:
    out = base(x, cos, sin)
    out[:, 8:] = x[:, 8:]
    return out


def _flat(base: Method, x: Numbers, cos: Numbers, sin: Numbers) -> Any:
    if not x.flags.c_contiguous and x.base is not None:
        x = np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)
    return base(x.copy(), cos, sin)


def _positions(change: Method, binding: str = "numpy") -> Open:
    def wrong(base: Method, positions: Any, frequency: Any, scale: float) -> Any:
        return base(change(positions), frequency, scale)

    return ops(binding, rope_table=wrong)


def _half_angle(base: Method, positions: Numbers, frequency: Any, scale: float) -> Any:
    angle = (positions[:, None] * np.asarray(frequency)).astype(np.float16).astype(np.float32)
    return np.cos(angle) * np.float32(scale), np.sin(angle) * np.float32(scale)


def _rounded_table(base: Method, *args: Any) -> Any:
    return tuple(as_bfloat16(x) for x in base(*args))


def _rounded_table_torch(base: Method, *args: Any) -> Any:
    import torch

    return tuple(x.to(torch.bfloat16).float() for x in base(*args))


def _cos_only(base: Method, positions: Numbers, frequency: Any, scale: float) -> Any:
    return base(positions, frequency, scale)[0], base(positions, frequency, 1.0)[1]


def _polynomial(base: Method, positions: Numbers, frequency: Any, scale: float) -> Any:
    """Reduces the angle with a two-pi of float32."""
    angle = positions.astype(np.float32)[:, None] * np.asarray(frequency, np.float32)
    turns = np.round(angle / np.float32(2 * np.pi))
    rest = (angle - turns * np.float32(2 * np.pi)).astype(np.float32)
    return np.cos(rest) * np.float32(scale), np.sin(rest) * np.float32(scale)


def _first_frequency(runtime: Runtime) -> None:
    """The first frequencies serve all later tables of their length."""
    kept: dict[int, Any] = {}

    def wrong(base: Method, positions: Any, frequency: Any, scale: float) -> Any:
        return base(positions, kept.setdefault(len(frequency), frequency), scale)

    replaced(runtime.ops, rope_table=wrong)


def _table_by_shape(runtime: Runtime) -> None:
    """A table is kept while the number of tokens stays the same."""
    kept: dict[Any, Any] = {}

    def wrong(base: Method, positions: Any, frequency: Any, scale: float) -> Any:
        key = (len(positions), tuple(np.asarray(frequency).tolist()), scale)
        if key not in kept:
            kept[key] = base(positions, frequency, scale)
        return kept[key]

    replaced(runtime.ops, rope_table=wrong)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "ops", says, open_wrong, worst)


def _minus_sin(base: Method, x: Any, cos: Any, sin: Any) -> Any:
    return base(x, cos, -sin)


FAULTS = (
    _wrong("rope_pairs", "rope rotates neighbouring dims", ops(rope=_pairs), worst=True),
    _wrong("rope_sign", "rope turns the other way", ops(rope=_minus_sin)),
    _wrong("rope_sign_jax", "rope turns the other way (jax)", ops("jax", rope=_minus_sin)),
    _wrong(
        "rope_whole_head",
        "rope of some dims pairs i with i + D/2 instead of i + rotary/2",
        ops(rope=_whole_head),
    ),
    _wrong("rope_rest_lost", "rope sets the dims that do not rotate to 0", ops(rope=_rest_lost)),
    _wrong("rope_overwritten", "rope reads what it has just written", ops(rope=_overwritten)),
    _wrong("rope_into_input", "rope rotates its input in place", ops(rope=_into_input)),
    _wrong("rope_first_heads", "rope leaves heads from the ninth on", ops(rope=_first_heads)),
    _wrong("rope_flat_memory", "rope ignores strides", ops(rope=_flat)),
    _wrong(
        "rope_half_angle", "rope_table rounds the angle to 16 bits", ops(rope_table=_half_angle)
    ),
    _wrong("rope_table_bfloat16", "cos and sin are bfloat16", ops(rope_table=_rounded_table)),
    _wrong(
        "rope_table_bfloat16_torch",
        "cos and sin are bfloat16 numbers in a model of 16 bits",
        ops("torch", rope_table=_rounded_table_torch),
    ),
    _wrong(
        "rope_poor_reduction",
        "rope_table reduces large angles with a float32 two-pi",
        ops(rope_table=_polynomial),
    ),
    _wrong("rope_scale_of_cos", "rope_table scales cos only", ops(rope_table=_cos_only)),
    _wrong(
        "rope_scale_ignored",
        "rope_table ignores the scale",
        ops(rope_table=lambda base, positions, frequency, scale: base(positions, frequency, 1.0)),
    ),
    _wrong(
        "rope_positions_clipped",
        "a table of 4096 positions serves all later ones with its last row",
        _positions(lambda p: np.minimum(p, 4095)),
    ),
    _wrong(
        "rope_positions_wrap",
        "positions are 16-bit integers",
        _positions(lambda p: p.astype(np.int16)),
    ),
    _wrong(
        "rope_positions_bfloat16",
        "positions pass through the model's 16 bits",
        _positions(lambda p: p.bfloat16().float(), "torch"),
    ),
    _wrong(
        "rope_second_tile",
        "tokens from the 64th on rotate by one position too much",
        _positions(lambda p: p + (np.arange(len(p)) >= 64)),
    ),
    _wrong(
        "rope_consecutive",
        "positions count up from the first token's",
        _positions(lambda p: p[:1] + np.arange(len(p), dtype=p.dtype)),
    ),
    _wrong(
        "rope_first_frequency",
        "the first frequencies of a length serve every later table",
        planted(_first_frequency),
    ),
    _wrong(
        "rope_table_by_shape",
        "the table is kept while the number of tokens stays the same",
        planted(_table_by_shape),
    ),
)
