"""Weights in oneDNN's blocked layout, where the CPU build of torch has it.

`F.linear` reorders a plain weight inside every call (bfloat16) or runs a BLAS that does not know
the processor (float32 on some). Blocked once at load, [576, 1536] in float32 takes 0.18 instead of
0.48 ms for 32 rows on two cores, and 0.06 instead of 0.17 for one (torch 2.13, AVX-512). The ops
are torch's own, those that its compiler emits.

Knows: one weight and its layout. Does not know: models, parameters.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

PACKED_DTYPES = (torch.float32, torch.bfloat16)


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight [out, in] in the blocked layout, or None where that does not work."""
    if weight.device.type != "cpu" or weight.ndim != 2 or not _works(weight.dtype):
        return None
    return _reorder(weight)


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """The plain weight again."""
    return weight.to_dense()


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def packed_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in float32 also for 16-bit operands.

    The op stores what it summed in float32 as 16 bits. A second pass that adds minus the first
    result stores the remainder; their sum holds 16 bits of the float32 result, for no more memory
    traffic than float32 weights.
    """
    high = packed_linear(x, weight, bias)
    if high.dtype == torch.float32:
        return high
    low: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, -high, weight, bias, "add")
    return high.float() + low.float()


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return out


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build and processor can do it: tried once, as no flag tells."""
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype not in PACKED_DTYPES or not is_built:
        return False
    x = (torch.arange(32 * 3).reshape(3, 32) % 7).to(dtype)
    weight = (torch.arange(48 * 32).reshape(48, 32) % 5).to(dtype)
    try:
        packed = _reorder(weight)
        same = torch.equal(packed_linear(x, packed, None), F.linear(x, weight))
        same &= torch.equal(packed_logits(x, packed, None), F.linear(x.float(), weight.float()))
        return same and torch.equal(unpack(packed), weight)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
