"""What a KV cache of 8 bits must hold: float64, straight from the contract.

    scale = max|x| / 127 in float32, one per token and KV head;  code = round(x / scale)

A code may be the neighbour where x / scale lies between two codes, and a scale one unit in the last
place away: float32 divisions are done in more than one way.

Knows: codes, scales, the names under which blocks are exported. Does not know: backends, steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Failed, require

Numbers = NDArray[Any]

NAMES = ("k", "v", "k_scale", "v_scale")
ULP = 2.0**-23
BETWEEN = 0.5 + 127 * 2.0**-22
"""Of x / scale from its code: half, and what a quotient of float32 is off."""


def quantise(x: Numbers) -> tuple[Numbers, Numbers]:
    """x [..., D] -> codes [..., D] (whole numbers), scales [...], both float64; NaN where a vector
    holds NaN or infinity."""
    amax = np.abs(x).max(-1)
    scales = (amax / 127).astype(np.float32).astype(np.float64)
    scales = np.where(np.isfinite(scales), scales, np.nan)
    return np.rint(quotients(x, scales)) + 0.0, scales  # codes have no -0


def quotients(x: Numbers, scales: Numbers) -> Numbers:
    """x / scale, not rounded; 0 of zeros, NaN where the scale is not a number."""
    with np.errstate(invalid="ignore"):
        found: Numbers = x / np.where(scales == 0, 1.0, scales)[..., None]
    return np.where(np.isnan(scales)[..., None], np.nan, found)


def worth(codes: Numbers, scales: Numbers) -> Numbers:
    """code * scale, exact in float64."""
    with np.errstate(invalid="ignore"):
        found: Numbers = np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None]
    return found


def held(x: Numbers) -> Numbers:
    """What is left of x in the cache."""
    return worth(*quantise(x))


def blocks_of(keys: Numbers, values: Numbers) -> dict[str, Numbers]:
    """Arrays for import_blocks. Vectors that are not numbers come with codes of every kind, -128
    too, and with a scale that is NaN or, of infinities, infinite."""
    found = {}
    for name, x in (("k", keys), ("v", values)):
        codes, scales = quantise(x)
        bad = np.isnan(scales)
        any_code = np.random.default_rng(5).integers(-128, 128, codes.shape)
        found[name] = np.where(bad[..., None], any_code, np.nan_to_num(codes)).astype(np.int8)
        is_infinite = np.isinf(x).any(-1)
        found[f"{name}_scale"] = np.where(is_infinite, np.inf, scales).astype(np.float32)
    return found


def values_of(blocks: Mapping[str, Numbers]) -> tuple[Numbers, Numbers]:
    return worth(blocks["k"], blocks["k_scale"]), worth(blocks["v"], blocks["v_scale"])


def require_names(exported: Mapping[str, Any]) -> None:
    """Failed unless these are codes int8 and scales float32, one for each vector."""
    require(
        set(exported) == set(NAMES),
        f"export_blocks of a cache of 8 bits gave {', '.join(sorted(exported))}, not "
        f"{', '.join(NAMES)}",
    )
    for name, x in exported.items():
        kind = "float32" if name.endswith("_scale") else "int8"
        if np.asarray(x).dtype != kind:
            raise Failed(f"export_blocks gave {name} as {np.asarray(x).dtype}, expected {kind}")
    for name in "kv":
        codes, scales = np.shape(exported[name]), np.shape(exported[f"{name}_scale"])
        require(
            codes[:-1] == scales,
            f"export_blocks gave {name} {list(codes)} and {name}_scale {list(scales)}; there is a "
            "scale for each token and KV head: [layer, block, token, head]",
        )
