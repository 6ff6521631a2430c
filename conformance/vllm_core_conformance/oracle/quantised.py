"""Weights of few bits, from the contract's text: what codes are worth, how inputs are quantised,
how well a quantiser does.

`value = scale * code + min`, or `scale * (code - zero)` with zero 128 or 8, in float32 as written.
Inputs of a token share `amax / 127` in groups of the weight's, or of 32 where those are smaller.

Knows: the contract. Does not know: devices, schemes of other formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.oracle import ops

Numbers = NDArray[Any]
Tensors = Mapping[str, Numbers]

TINY = 2.0**-118
"""A group of smaller magnitudes counts as zeros."""
ONE_SIGN = 3.0
"""An honest sum of codes without their zero point was 6.3 times the noise of a usual sum away."""
single = np.float32


# ---------------------------------------------------------------- values of codes
def spread(per_group: Numbers, size: int) -> Numbers:
    """[n, groups] -> [n, size]."""
    return np.repeat(per_group, size // per_group.shape[1], axis=1)


def terms(tensors: Tensors, bits: int) -> tuple[Numbers, Numbers]:
    """float64 [rows, in]: a value is first + second, which a kernel may sum up apart."""
    codes, size = tensors["codes"].astype(np.float64), tensors["codes"].shape[1]
    scales = spread(tensors["scales"].astype(np.float64), size)
    if "mins" in tensors:
        return codes * scales, spread(tensors["mins"].astype(np.float64), size)
    return codes * scales, -(2.0 ** (bits - 1)) * scales


def values(tensors: Tensors, bits: int) -> Numbers:
    """[rows, in], exact in float32."""
    codes, size = tensors["codes"].astype(single), tensors["codes"].shape[1]
    scales = spread(tensors["scales"], size)
    if "mins" in tensors:
        found = scales * codes + spread(tensors["mins"], size)
    else:
        found = scales * (codes - single(2 ** (bits - 1)))
    return np.asarray(found, np.float64)


# ---------------------------------------------------------------- inputs
def input_group(group: int, size: int) -> int:
    return min(max(group, 32), size)


def _scaled(x: Numbers, group: int) -> tuple[Numbers, Numbers]:
    """(x * 127 / amax, amax) of groups, [T, groups, group] and [T, groups, 1]."""
    parts = x.astype(single).reshape(len(x), -1, group)
    amax = np.abs(parts).max(-1, keepdims=True)
    amax = np.where(amax < TINY, single(0), amax)
    factor = np.where(amax > 0, single(127) / np.where(amax > 0, amax, single(1)), single(0))
    return parts * factor, amax


def coded_inputs(x: Numbers, group: int) -> Numbers:
    """x [T, in] as products of quantised inputs see it; `group` is that of the inputs."""
    scaled, amax = _scaled(x, group)
    scale = (amax / single(127)).astype(np.float64)
    return np.asarray((np.rint(scaled) * scale).reshape(x.shape))


def without_ties(x: Numbers, group: int, margin: float = 2e-3) -> Numbers:
    """x with 0 in the place of what lies between two codes, where honest arithmetic may give
    either."""
    scaled, _ = _scaled(x, group)
    scaled = scaled.reshape(x.shape).astype(np.float64)
    between = np.abs(np.abs(scaled - np.floor(scaled)) - 0.5) < margin
    return np.where(between, 0.0, x)


# ---------------------------------------------------------------- products
def noise_product(
    exact: Numbers,
    x: Numbers,
    parts: tuple[Numbers, Numbers],
    bias: Numbers | None,
    *,
    ratio: float,
) -> Numbers:
    """As of linear, of such a result; a float32 sum may hold codes and what is added to them apart,
    and then runs through many values of one sign."""
    size = np.abs(parts[0]) + np.abs(parts[1])
    n = np.abs(exact) + ratio * ONE_SIGN * ops.noise_sum(x, size)
    return np.asarray(n if bias is None else n + np.abs(bias))


# ---------------------------------------------------------------- quantisers
def quantised(weight: Numbers, bits: int, group: int) -> Numbers:
    """What the contract's quantiser makes of a weight, as values [rows, in]."""
    parts = weight.astype(single).reshape(len(weight), -1, group)
    place = np.abs(parts).argmax(-1)[..., None]
    extreme = np.take_along_axis(parts, place, -1)
    extreme = np.where(np.abs(extreme) < TINY, single(0), extreme)
    if bits == 8:
        found = _rounded(parts, np.abs(extreme) / single(127), -127, 127)
        return np.asarray(found.reshape(weight.shape), np.float64)
    one, two = (_rounded(parts, extreme / single(divisor), -8, 7) for divisor in (-8, -9))
    errors = [((found.astype(np.float64) - parts) ** 2).sum(-1) for found in (one, two)]
    found = np.where((errors[1] < errors[0])[..., None], two, one)
    return np.asarray(found.reshape(weight.shape), np.float64)


def _rounded(parts: Numbers, scale: Numbers, low: int, high: int) -> Numbers:
    steps = np.rint(parts / np.where(scale == 0, single(1), scale))
    return np.asarray(np.clip(steps, low, high) * scale)
