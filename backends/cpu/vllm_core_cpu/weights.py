"""A weight as our kernels read it: packed once, with the record that every call passes.

Knows: native structs, torch tensors. Does not know: models, ops' names.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from vllm_core_cpu import native

DTYPES = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
EPILOGUES = {"none": 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, eq=False)
class Packed:
    """One weight [n, k]. `static` of its Param; the tensors that it points at are the arrays."""

    n: int
    k: int
    dtype: torch.dtype
    plain: native.Linear
    """Results in the weight's dtype."""
    wide: native.Linear
    """Results in float32."""
    gated: dict[str, native.Linear]
    """By activation; results of the first half of the rows gate those of the second. Empty where
    the rows cannot be halved."""
    addresses: dict[str, int]


def pack(
    kernels: native.Native, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], Packed]:
    """weight [n, k] in float32 or bfloat16, bias [n] -> the arrays and the record of a Param."""
    n, k = weight.shape
    dtype = DTYPES[weight.dtype]
    weight = weight.contiguous()
    packed = torch.empty(kernels.packed_bytes(dtype, n, k), dtype=torch.uint8)
    kernels.pack(dtype, weight.data_ptr(), k, n, k, packed.data_ptr())
    arrays = {"packed": packed}
    if bias is not None:
        arrays["bias"] = bias.to(torch.float32, copy=True)
    return arrays, describe(arrays, n, k, weight.dtype)


def describe(arrays: dict[str, torch.Tensor], n: int, k: int, dtype: torch.dtype) -> Packed:
    """The record of arrays that `pack` made."""
    bias = arrays["bias"].data_ptr() if "bias" in arrays else None

    def record(rows: int, out: torch.dtype, epilogue: str) -> native.Linear:
        return native.Linear(
            arrays["packed"].data_ptr(), bias, rows, k, DTYPES[dtype], DTYPES[out],
            EPILOGUES[epilogue],
        )  # fmt: skip

    gated = {}
    if n % (2 * native.PANEL) == 0:
        gated = {kind: record(n // 2, dtype, kind) for kind in ("silu", "gelu_tanh")}
    plain, wide = record(n, dtype, "none"), record(n, torch.float32, "none")
    addresses = {kind: ctypes.addressof(x) for kind, x in gated.items()}
    addresses |= {"plain": ctypes.addressof(plain), "wide": ctypes.addressof(wide)}
    return Packed(n, k, dtype, plain, wide, gated, addresses)


def unpack(kernels: native.Native, packed: torch.Tensor, facts: Packed) -> torch.Tensor:
    """The plain weight [n, k] again."""
    out = torch.empty(facts.n, facts.k, dtype=facts.dtype)
    kernels.unpack_rows(
        DTYPES[facts.dtype], packed.data_ptr(), None, facts.n, facts.n, facts.k, out.data_ptr()
    )
    return out
