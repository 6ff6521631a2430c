"""Judges numbers: errors in units of the op's own noise, against locked limits.

z = |o - o64| / (u n): u the unit roundoff of the result's dtype, n the op's first-order noise, o64
float64 on the bits that the backend consumed. Numeric classes multiply n: A 1, B 8, C 64. What lies
below the smallest normal number may be flushed to 0.

Knows: limits.json, classes, the shape of an error. Does not know: how a result was computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Evidence, Failed, Measure

Numbers = NDArray[Any]

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
}
CLASSES = {"A": 1.0, "B": 8.0, "C": 64.0}
BIAS_LIMIT = 0.25
"""Of the lean away from 0, in roundings: truncation gives -0.7, honest implementations stay below
0.07 (attention and ops in bfloat16 and float16, five implementations)."""
BIAS_COUNT = 2_000
"""Fewer elements show no bias."""
BIAS_WEIGHT = 1_000.0
"""Nor do those of whose noise hardly any is their own rounding, as in float32 sums. In float32 and
float64 no bias is judged: a root or an exp that is one ulp off may honestly lean."""


@dataclass(frozen=True)
class Limits:
    """Of one op: root mean square of z over a case, and the largest z."""

    rms: float
    max: float


@cache
def limits_table() -> dict[str, Any]:
    text = resources.files("vllm_core_conformance").joinpath("limits.json").read_text()
    table: dict[str, Any] = json.loads(text)
    return table


def limits_of(op: str, dtype: str) -> Limits:
    """The locked limits; an op may have its own for models of 16 bits ("op/16")."""
    table = limits_table()["limits"]
    if dtype in ("bfloat16", "float16") and f"{op}/16" in table:
        op = f"{op}/16"
    return Limits(*table[op])


def u32_over_u(dtype: str) -> float:
    """Ratio of float32's roundoff to the dtype's: what one float32 operation adds, in units u."""
    return ROUNDOFF["float32"] / ROUNDOFF[dtype]


def z_of(out: Numbers, exact: Numbers, noise: Numbers, dtype: str, multiplier: float) -> Numbers:
    """Errors in units of the noise; NaN equals nothing, equal infinities are equal."""
    out = np.asarray(out, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(out - exact)
        z = error / (ROUNDOFF[dtype] * noise * multiplier + SMALLEST_NORMAL[dtype])
    z = np.where(out == exact, 0.0, z)
    return np.where(np.isnan(z), np.inf, z)


def judge(
    op: str,
    out: Numbers,
    exact: Numbers,
    noise: Numbers,
    *,
    dtype: str,
    numeric_class: str = "A",
    axes: Sequence[str] = (),
    where: str = "",
    blocks: dict[str, int] | None = None,
) -> Evidence:
    """Evidence with one Measure (always on the scale of class A), or Failed with the shape of the
    error.

    axes: names of out's axes, for the sentence. blocks: axis name -> size at which errors might
    align (a block, a tile). where: what was computed, for the sentence.
    """
    if out.shape != exact.shape:
        raise Failed(f"{where or op}: shape {list(out.shape)}, expected {list(exact.shape)}")
    if numeric_class not in CLASSES:
        raise Failed(f"it declares numeric class {numeric_class!r}; there are {', '.join(CLASSES)}")
    limits = limits_of(op, dtype)
    multiplier = CLASSES[numeric_class]
    z = z_of(out, exact, noise, dtype, 1.0)
    rms = float(np.sqrt(np.mean(np.square(z)))) if z.size else 0.0
    worst = float(z.max(initial=0.0))
    measure = Measure(op, rms, worst, int(z.size), limits.rms, limits.max)
    if not (measure.rms <= limits.rms * multiplier and measure.max <= limits.max * multiplier):
        raise _failure(op, out, exact, z, measure, numeric_class, axes, where, blocks or {})
    bias = _bias(out, exact, noise, dtype)
    is_16_bit = ROUNDOFF[dtype] > ROUNDOFF["float32"]
    if is_16_bit and multiplier == 1.0 and abs(bias) > BIAS_LIMIT:
        how = "cut off towards zero" if bias < 0 else "rounded away from zero"
        raise Failed(
            f"{where or op}: results are {how}: mean signed error {bias:+.2f} roundings "
            f"over {out.size} elements (rounding to nearest gives 0)",
            bias=bias,
        )
    return Evidence(checks=int(z.size), measures=[measure])


def _bias(out: Numbers, exact: Numbers, noise: Numbers, dtype: str) -> float:
    """How far results lean away from 0, in roundings of their own: the regression of the signed z
    on |o64| / n, so that elements count by how much of their noise is their own rounding."""
    own = np.isfinite(exact) & (np.abs(exact) > 4 * SMALLEST_NORMAL[dtype]) & (noise > 0)
    share = np.abs(exact[own]) / np.broadcast_to(noise, exact.shape)[own]
    weight = float(np.sum(np.square(share)))
    if share.size < BIAS_COUNT or weight < BIAS_WEIGHT:
        return 0.0
    signed = (np.asarray(out, np.float64)[own] - exact[own]) / exact[own] / ROUNDOFF[dtype]
    lean = float(np.sum(np.clip(signed * share, -4, 4) * share)) / weight
    if abs(lean) <= BIAS_LIMIT:
        return lean
    # one number that comes often is rounded one way: only different numbers tell of a habit
    _, first = np.unique(np.abs(exact[own]), return_index=True)
    share, signed = share[first], signed[first]
    weight = float(np.sum(np.square(share)))
    if share.size < BIAS_COUNT or weight < BIAS_WEIGHT:
        return 0.0
    return float(np.sum(np.clip(signed * share, -4, 4) * share)) / weight


def _failure(
    op: str,
    out: Numbers,
    exact: Numbers,
    z: Numbers,
    measure: Measure,
    numeric_class: str,
    axes: Sequence[str],
    where: str,
    blocks: dict[str, int],
) -> Failed:
    place = np.unravel_index(int(np.argmax(z)), z.shape)
    names = list(axes) or [f"axis {i}" for i in range(z.ndim)]
    at = ", ".join(f"{name} {int(i)}" for name, i in zip(names, place, strict=True))
    bad = z > measure.max_limit * CLASSES[numeric_class]
    shape = _alignment(bad, names, blocks)
    got, want = float(np.asarray(out, np.float64)[place]), float(exact[place])
    return Failed(
        f"{where or op}: {int(bad.sum())} of {z.size} elements are off; worst at {at}: "
        f"got {got:.6g}, expected {want:.6g} ({float(z[place]):.3g} times the noise; allowed "
        f"{measure.max_limit * CLASSES[numeric_class]:.3g}, rms {measure.rms:.3g} of "
        f"{measure.rms_limit * CLASSES[numeric_class]:.3g}){shape}",
        rms=measure.rms,
        max=measure.max,
        worst=[int(i) for i in place],
        off=int(bad.sum()),
        of=int(z.size),
    )


def _alignment(bad: Numbers, names: Sequence[str], blocks: dict[str, int]) -> str:
    """ "; all in token 16..31" and the like, when errors keep to few places of an axis."""
    if not bad.any():
        return "; the errors are everywhere, and small"
    found = []
    for axis, name in enumerate(names):
        hit = np.nonzero(bad.any(axis=tuple(i for i in range(bad.ndim) if i != axis)))[0]
        size = bad.shape[axis]
        if 0 < len(hit) <= size / 2:
            spread = f"{hit[0]}" if len(hit) == 1 else f"{hit[0]}..{hit[-1]}"
            found.append(f"all in {name} {spread} ({len(hit)} of {size})")
        block = blocks.get(name)
        if block and len(hit) and len({int(i) % block for i in hit}) <= max(1, block // 8):
            found.append(
                f"{name} aligned to {block}: remainders {sorted({int(i) % block for i in hit})}"
            )
    return "".join(f"; {text}" for text in found)


def require_equal(
    out: Numbers, exact: Numbers, what: str, *, axes: Sequence[str] = (), nan_equal: bool = False
) -> Evidence:
    """Bit for bit (0.0 and -0.0 differ); where nan_equal, NaN equals NaN. For data movement."""
    a, b = np.asarray(out), np.asarray(exact)
    if a.shape != b.shape:
        raise Failed(f"{what}: shape {list(a.shape)}, expected {list(b.shape)}")
    same = a == b
    if a.dtype.kind in "fV" or b.dtype.kind in "fV":
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        same = (a64 == b64) & (np.signbit(a64) == np.signbit(b64))
        if nan_equal:
            same |= np.isnan(a64) & np.isnan(b64)
    if not same.all():
        place = np.unravel_index(int(np.argmin(same)), same.shape)
        names = list(axes) or [f"axis {i}" for i in range(same.ndim)]
        at = ", ".join(f"{name} {int(i)}" for name, i in zip(names, place, strict=True))
        raise Failed(
            f"{what}: {int((~same).sum())} of {same.size} values differ; first at {at}: "
            f"got {a[place]}, expected {b[place]}{_alignment(~same, names, {})}",
            worst=[int(i) for i in place],
            off=int((~same).sum()),
            of=int(same.size),
        )
    return Evidence(checks=max(1, int(same.size)))
