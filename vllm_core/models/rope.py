"""Rotary frequencies from a config's rope parameters.

Follows transformers (modeling_rope_utils) in float32. A kind or a key that is not known is refused,
never ignored.

Knows: default, linear, llama3, yarn. Does not know: layers, ops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_core.errors import ModelError, NotSupported
from vllm_core.models.spec import RopeSpec

RopeParameters = Mapping[str, Any]

_LONGER = "original_max_position_embeddings"
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _LONGER}, set()),
    "yarn": (
        {"factor", _LONGER},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
"""Kind -> (keys it needs, keys it may have)."""

_ALWAYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def rope_spec(parameters: RopeParameters, dim: int, max_position_embeddings: int) -> RopeSpec:
    """`parameters`: one flat dict of `config.rope_parameters`; `dim`: the head size.

    Raises NotSupported for a scaling that is not known, ModelError for one that lacks a key.
    """
    kind = _checked_kind(parameters)
    theta = parameters.get("rope_theta")
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise ModelError(f"the config's rope_theta must be a number above 0, not {theta!r}")
    if dim % 2:
        raise NotSupported(f"rope needs heads of even size, but the config has head_dim {dim}")
    base = np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    frequency, scale = np.float32(1.0) / base, 1.0
    if kind == "linear":
        frequency = frequency / np.float32(parameters["factor"])
    elif kind == "llama3":
        frequency = _llama3(frequency, parameters)
    elif kind == "yarn":
        frequency, scale = _yarn(base, parameters, dim, max_position_embeddings)
    return RopeSpec(dim, tuple(float(f) for f in frequency.astype(np.float32)), scale)


def context_length(parameters: RopeParameters, max_position_embeddings: int) -> int:
    """The context that the model is for: yarn's keys may name a longer one than the config."""
    if _checked_kind(parameters) != "yarn" or parameters["factor"] is None:
        return max_position_embeddings
    return max(max_position_embeddings, int(parameters[_LONGER] * parameters["factor"]))


def _checked_kind(parameters: RopeParameters) -> str:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _KEYS:
        raise NotSupported(f"the config's rope scaling is {kind!r}; known are {', '.join(_KEYS)}")
    needed, optional = _KEYS[kind]
    if missing := needed - set(parameters):
        raise ModelError(f"the config's rope scaling {kind!r} lacks {sorted(missing)[0]!r}")
    for key in needed:
        value, may_be_none = parameters[key], kind == "yarn" and key == "factor"
        if not isinstance(value, (int, float)) and not (may_be_none and value is None):
            raise ModelError(f"the config's rope scaling {kind!r} needs a number as {key}")
    if unknown := set(parameters) - needed - optional - _ALWAYS:
        raise NotSupported(
            f"the config's rope scaling {kind!r} sets {sorted(unknown)[0]!r}, which is not "
            f"supported; known are {', '.join(sorted(needed | optional | _ALWAYS))}"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise NotSupported(
            f"the config rotates {parameters['partial_rotary_factor']} of each head; "
            "only whole heads are supported"
        )
    return str(kind)


def _llama3(frequency: np.ndarray[Any, Any], parameters: RopeParameters) -> np.ndarray[Any, Any]:
    """Long wavelengths divided by the factor, short ones kept, a ramp between (Llama 3.1)."""
    factor, length = float(parameters["factor"]), float(parameters[_LONGER])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelength = 2 * math.pi / frequency.astype(np.float64)
    smooth = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    scaled: np.ndarray[Any, Any] = (1 - smooth) * frequency / factor + smooth * frequency
    return scaled


def _yarn(
    base: np.ndarray[Any, Any], parameters: RopeParameters, dim: int, max_position_embeddings: int
) -> tuple[np.ndarray[Any, Any], float]:
    """YaRN (arXiv 2309.00071): interpolates slow dims, keeps fast ones, and scales cos and sin."""
    length, theta = float(parameters[_LONGER]), float(parameters["rope_theta"])
    factor = parameters["factor"]
    factor = max_position_embeddings / length if factor is None else float(factor)
    scale = parameters.get("attention_factor")
    if scale is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scale = _mscale(factor, 1)
        if mscale and mscale_all:
            scale = _mscale(factor, mscale) / _mscale(factor, mscale_all)

    def dim_of(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dim_of(parameters.get("beta_fast") or 32)
    high = dim_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (ramp / factor + (1 - ramp)) / base, float(scale)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
