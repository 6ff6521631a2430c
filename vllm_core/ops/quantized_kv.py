"""The KV cache in 8 bits: codes, a scale per token and KV head, and what they are worth.

A vector x [dim] (K's or V's of one token and one KV head) is codes int8 [dim] and a float32 scale:

    scale = max|x| / 127        code = round(x / scale), in -127..127        value = code * scale

Zeros have scale 0 and codes 0. A vector with NaN or infinity has scale NaN and codes 0, so that all
its values are NaN: what reads it gives no number.

Everything is float32, rounded to nearest, ties to even, each operation once. A kernel may multiply
with 127 / max|x| instead: its scale is within one unit in the last place, and its code may be the
neighbour where x / scale lies between two codes.

Knows: one vector's numbers. Does not know: caches, layouts, which token is whose.
"""

from __future__ import annotations

import numpy as np

from vllm_core.ops.arrays import HostArray

MOST = np.float32(127)
"""The largest code, of the largest magnitude."""


def quantize_kv(x: HostArray) -> tuple[HostArray, HostArray]:
    """x [..., dim] of any float dtype -> codes int8 [..., dim], scales float32 [...]."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        x = np.asarray(x).astype(np.float32)
        amax = np.abs(x).max(-1)
        scales = np.where(np.isfinite(amax), amax / MOST, np.float32(np.nan))
        is_number = scales > 0
        divisor = np.where(is_number, scales, np.float32(1))[..., None]
        codes = np.clip(np.rint(x / divisor), -MOST, MOST)
    codes = np.where(is_number[..., None], codes, np.float32(0)).astype(np.int8)
    return codes, scales


def dequantize_kv(codes: HostArray, scales: HostArray) -> HostArray:
    """The values that attention reads, float32 [..., dim]."""
    with np.errstate(invalid="ignore", under="ignore"):
        values: HostArray = codes.astype(np.float32) * scales[..., None]
    return values
