"""Weights of few bits: codes, a scale per group of inputs, and what they are worth.

A weight [rows, in] of scheme "int8" or "int4" is two arrays or three: `codes` uint8 [rows, in], one
a byte on the host (0..255, 0..15); `scales` float32 [rows, groups]; perhaps `mins` float32 [rows,
groups]. A group is in / groups consecutive inputs: 16, 32, 64, 128 or all of a row.

    value = scale * code + min      with mins
    value = scale * (code - zero)   without, zero = 128 or 8

The inputs of such a product are quantised too, each token by itself: see `quantize_inputs`. The
schemes "int8-weight-only" and "int4-weight-only" have the same codes, and leave inputs as they are.

Everything here is float32 in the order that is written; each operation rounds once (no fused
multiply-add) and to nearest, ties to even, so that a kernel can give the same bits.

Knows: codes and their arithmetic. Does not know: layouts, files, which weights are quantised.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vllm_core.errors import InvalidArgument, WeightError
from vllm_core.ops.arrays import HostArray

BITS = {"int8": 8, "int4": 4, "int8-weight-only": 8, "int4-weight-only": 4}
"""Bits of a code, by scheme."""
GROUPS = (128, 64, 32, 16)
"""Inputs that may share a scale, beside all of a row."""
LARGEST_GROUPS = {8: 128, 4: 64}
"""By bits, of a dense weight that is quantised where no group was asked for. Smaller ones cost time
and memory; of int4 they were measured, without a gain that held on all texts
(docs/performance.md)."""
TINY = 2.0**-118
"""A group whose largest magnitude is below this counts as zeros: its scale would not be normal."""
PARTIAL_SUMS = 16
INT4_DIVISORS = (-8, -9)
"""The extreme over -8 uses every code, and over -9 cuts the extreme off: often better for the
rest. Of 19 divisors the best gains another 0.1 to 0.3 dB."""
_CHUNK = 1 << 20
"""Weights that are worked on at a time."""

Tensors = Mapping[str, HostArray]


def is_weight_only(scheme: str) -> bool:
    """Whether inputs keep the model's dtype."""
    return scheme.endswith("-weight-only")


def zero_of(bits: int) -> int:
    """The code of 0 where there are no mins."""
    return 1 << (bits - 1)


def group_for(bits: int, size: int, largest: int | None = None) -> int | None:
    """Inputs per scale when a dense weight is quantised at load: as many as divide it, `largest` at
    most (None: that of `LARGEST_GROUPS`); None: it stays dense."""
    largest = largest or LARGEST_GROUPS[bits]
    fit = (group for group in (128, 64, 32) if group <= largest and size % group == 0)
    return next(fit, None)


def input_group(group: int, size: int) -> int:
    """Inputs that share a scale of theirs, for weights of such a group: 32 or more."""
    return min(max(group, 32), size)


def num_bytes(scheme: str, rows: int, size: int, group: int, has_mins: bool = False) -> int:
    """Of codes, scales and mins with no room lost between them."""
    return rows * (size * BITS[scheme] // 8 + size // group * (8 if has_mins else 4))


# ---------------------------------------------------------------- weights
def quantize(weight: HostArray, bits: int, group: int) -> dict[str, HostArray]:
    """[rows, in] of any float dtype -> codes and scales.

    8 bits: scale = amax / 127 with amax the largest magnitude of the group; code = round(w / scale)
    + 128, in 1..255.
    4 bits: with the extreme (the first value of the largest magnitude), for each divisor d of -8
    and -9: scale = extreme / d, code = round(w / scale) + 8 cut to 0..15, e = w - scale * (code -
    8), error = sum of e * e in 16 partial sums: value i of the group goes to sum i modulo 16, in
    order; then the upper half of the sums is added to the lower, four times. The second divisor is
    taken where its error is smaller.
    A group of zeros (see TINY) has scale 0 and the codes of 0. WeightError for NaN and infinity,
    InvalidArgument for a group that does not divide `in`.
    """
    weight = np.asarray(weight)
    rows, size = weight.shape
    if bits not in (8, 4):
        raise InvalidArgument(f"weights are quantised to 8 or 4 bits, not to {bits}")
    check_group(size, group)
    codes = np.empty((rows, size), np.uint8)
    scales = np.empty((rows, size // group), np.float32)
    step = max(1, _CHUNK // size)
    for at in range(0, rows, step):
        some = slice(at, at + step)
        groups = weight[some].astype(np.float32).reshape(-1, size // group, group)
        if not np.isfinite(groups).all():
            raise WeightError("a weight that is to be quantised holds NaN or infinity")
        found, scales[some] = (_int8 if bits == 8 else _int4)(groups)
        codes[some] = found.reshape(-1, size)
    return {"codes": codes, "scales": scales}


def _int8(groups: HostArray) -> tuple[HostArray, HostArray]:
    """[rows, groups, group] -> codes of the same shape, scales [rows, groups]."""
    amax = np.abs(groups).max(-1)
    scales = np.where(amax < TINY, np.float32(0), amax / np.float32(127))
    return _codes(groups, scales, 128, 1, 255), scales


def _int4(groups: HostArray) -> tuple[HostArray, HostArray]:
    place = np.abs(groups).argmax(-1)[..., None]
    extreme = np.take_along_axis(groups, place, -1)[..., 0]
    extreme = np.where(np.abs(extreme) < TINY, np.float32(0), extreme)
    first, second = (extreme / np.float32(divisor) + np.float32(0) for divisor in INT4_DIVISORS)
    codes, other = (_codes(groups, scales, 8, 0, 15) for scales in (first, second))
    is_better = _error(groups, other, second) < _error(groups, codes, first)
    codes = np.where(is_better[..., None], other, codes)
    return codes, np.where(is_better, second, first)


def _codes(groups: HostArray, scales: HostArray, zero: int, low: int, high: int) -> HostArray:
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.rint(groups / divisor) + np.float32(zero)
    codes = np.where(scales[..., None] == 0, np.float32(zero), codes)
    return np.clip(codes, low, high).astype(np.uint8)


def _error(groups: HostArray, codes: HostArray, scales: HostArray) -> HostArray:
    """Squared, [rows, groups]: summed in an order that vectors of 4 to 16 lanes can keep."""
    with np.errstate(over="ignore"):
        wrong = groups - scales[..., None] * (codes.astype(np.float32) - np.float32(8))
        wrong = wrong * wrong
        short = -wrong.shape[-1] % PARTIAL_SUMS
        if short:
            wrong = np.pad(wrong, ((0, 0), (0, 0), (0, short)))
        parts = wrong.reshape(*wrong.shape[:2], -1, PARTIAL_SUMS)
        sums = parts[..., 0, :]
        for place in range(1, parts.shape[-2]):
            sums = sums + parts[..., place, :]
        while sums.shape[-1] > 1:
            half = sums.shape[-1] // 2
            sums = sums[..., :half] + sums[..., half:]
    found: HostArray = sums[..., 0]
    return found


def dequantize(tensors: Tensors, bits: int) -> HostArray:
    """The values, float32 [rows, in]."""
    codes, scales, mins = tensors["codes"], tensors["scales"], tensors.get("mins")
    rows, size = codes.shape
    values = np.empty((rows, size), np.float32)
    step = max(1, _CHUNK // size)
    for at in range(0, rows, step):
        some = slice(at, at + step)
        groups = codes[some].reshape(-1, scales.shape[1], size // scales.shape[1])
        wide = groups.astype(np.float32)
        if mins is None:
            wide = (wide - np.float32(zero_of(bits))) * scales[some, :, None]
        else:
            wide = wide * scales[some, :, None] + mins[some, :, None]
        values[some] = wide.reshape(-1, size)
    return values


def check(tensors: Tensors, scheme: str, rows: int, size: int) -> None:
    """WeightError where these are no codes of the scheme for a weight [rows, size]."""
    lacking = [name for name in ("codes", "scales") if name not in tensors]
    if lacking:
        raise WeightError(f"a weight of scheme {scheme} lacks its {' and '.join(lacking)}")
    codes, scales = tensors["codes"], tensors["scales"]
    if codes.shape != (rows, size) or codes.dtype != np.uint8:
        raise WeightError(
            f"the codes of scheme {scheme} must be uint8 {[rows, size]}, but are {codes.dtype} "
            f"{list(codes.shape)}"
        )
    for name in ("scales", "mins"):
        array = tensors.get(name, scales)
        if array.dtype != np.float32 or array.ndim != 2 or array.shape != (rows, scales.shape[1]):
            raise WeightError(
                f"the {name} of scheme {scheme} must be float32 [{rows}, groups], one for each "
                f"group, but are {array.dtype} {list(array.shape)}"
            )
    num_groups = scales.shape[1]
    if num_groups == 0 or size % num_groups:
        raise WeightError(
            f"{size} inputs do not divide into {num_groups} groups of scheme {scheme}"
        )
    try:
        check_group(size, size // num_groups)
    except InvalidArgument as error:
        raise WeightError(f"scheme {scheme}: {error}") from None
    if BITS[scheme] == 4 and codes.size and int(codes.max()) > 15:
        raise WeightError(f"a code of scheme {scheme} is {int(codes.max())}; 15 is the largest")


def check_group(size: int, group: int) -> None:
    """InvalidArgument where a row of `size` inputs has no groups of `group`."""
    if group < 1 or size % group or (group not in GROUPS and group != size):
        raise InvalidArgument(
            f"{size} inputs cannot be quantised in groups of {group}; a group is one of "
            f"{', '.join(map(str, GROUPS))} that divides them, or all of a row"
        )
    if size % input_group(group, size):
        raise InvalidArgument(f"groups of {group} need a multiple of 32 inputs, not {size}")


# ---------------------------------------------------------------- products
def quantize_inputs(x: HostArray, group: int) -> tuple[HostArray, HostArray]:
    """x [T, in], `group` of the weight -> codes int8 [T, in], scales float32 [T, input groups].

    With amax the largest magnitude of a token's group (`input_group`): scale = amax / 127, code =
    round(x * (127 / amax)). Below TINY: 0 and 0s. A group with NaN or infinity has scale NaN, and
    so the token's results are NaN.
    """
    tokens, size = x.shape
    groups = x.astype(np.float32).reshape(tokens, -1, input_group(group, size))
    amax = np.abs(groups).max(-1)
    is_number, is_zero = np.isfinite(amax), amax < TINY
    divisor = np.where(is_number & ~is_zero, amax, np.float32(1))
    factor = np.where(is_number & ~is_zero, np.float32(127) / divisor, np.float32(0))
    with np.errstate(invalid="ignore"):
        codes = np.rint(groups * factor[..., None])
    codes = np.where(is_number[..., None], codes, np.float32(0)).astype(np.int8)
    scales = np.where(is_zero, np.float32(0), amax / np.float32(127))
    return codes.reshape(tokens, size), np.where(is_number, scales, np.float32(np.nan))


def product(x: HostArray, tensors: Tensors, scheme: str) -> HostArray:
    """x [T, in] times the weight -> float32 [T, rows], without bias: the law of `linear`.

    Where inputs are quantised, codes are multiplied and added as integers within a group, and the
    groups' sums, times both scales, in float32 in any order.
    """
    bits = BITS[scheme]
    if is_weight_only(scheme):
        return x.astype(np.float32) @ dequantize(tensors, bits).T
    scales, mins = tensors["scales"], tensors.get("mins")
    num_groups, size = scales.shape[1], x.shape[1]
    x_codes, x_scales = quantize_inputs(x, size // num_groups)
    zero = 0 if mins is not None else zero_of(bits)
    weight = tensors["codes"].astype(np.int32).reshape(-1, num_groups, size // num_groups) - zero
    codes = x_codes.astype(np.int32).reshape(len(x), num_groups, -1)
    sums = np.einsum("tgi,rgi->trg", codes, weight)
    own = np.repeat(x_scales, num_groups // x_scales.shape[1], -1)  # [T, groups]
    out = np.einsum("trg,rg,tg->tr", sums.astype(np.float32), scales, own)
    if mins is not None:
        out = out + np.einsum("tg,tg,rg->tr", codes.sum(-1).astype(np.float32), own, mins)
    product: HostArray = out.astype(np.float32)
    return product
