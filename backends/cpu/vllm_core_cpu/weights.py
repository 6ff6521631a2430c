"""A weight as our kernels read it: packed once, with the records that calls pass.

A weight is one piece, or several pieces of its rows where these came in different codes (a fused
product of a file that mixes them).

Knows: native structs, torch tensors. Does not know: models, ops' names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_core.bindings.torch.convert import from_host
from vllm_core.errors import WeightError
from vllm_core.ops import HostArray, quantized
from vllm_core_cpu import memory, native

Tensor = torch.Tensor

DTYPES = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
EPILOGUES = {"none": 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a weight. The tensors that the records point at are the arrays of its Param."""

    first: int
    """Its first row."""
    rows: int
    plain: native.Linear
    """Results in the model's dtype."""
    wide: native.Linear
    """Results in float32."""
    gated: dict[str, native.Linear]
    """By activation; results of the first half of the rows gate those of the second. Empty where
    the rows cannot be halved."""
    addresses: dict[str, int]


@dataclass(frozen=True, eq=False)
class Packed:
    """One weight [n, k]. `static` of its Param."""

    n: int
    k: int
    dtype: torch.dtype
    """Of inputs and results."""
    pieces: tuple[Piece, ...]

    @property
    def gates(self) -> frozenset[str]:
        """The activations with which it is gated in one call."""
        return frozenset(self.pieces[0].gated if len(self.pieces) == 1 else ())


def pack(
    kernels: native.Native,
    parts: Sequence[Tensor],
    bias: Tensor | None,
) -> tuple[dict[str, Tensor], Packed]:
    """Rows [n, k] one below the other, all float32 or all bfloat16; bias [sum of n] -> the arrays
    and the record of a Param."""
    if any(len(part) % native.PANEL for part in parts[:-1]):
        parts = [torch.cat(list(parts))]
    n, k = sum(map(len, parts)), parts[0].shape[1]
    weight_dtype = parts[0].dtype
    dtype = DTYPES[weight_dtype]
    packed = memory.zeros(kernels.packed_bytes(dtype, n, k))
    at = packed.data_ptr()
    for part in parts:
        rows = part.contiguous()
        kernels.pack(dtype, rows.data_ptr(), k, len(rows), k, at)
        at += kernels.packed_bytes(dtype, len(rows), k)
    arrays = {"packed": packed}
    if bias is not None:
        arrays["bias"] = bias.to(torch.float32, copy=True)
    linear = native.Linear(packed=packed.data_ptr(), k=k, group=k)
    piece = _piece(linear, arrays.get("bias"), 0, n, n, weight_dtype)
    return arrays, Packed(n, k, weight_dtype, (piece,))


@dataclass(frozen=True)
class Codes:
    """Rows of a weight in codes (vllm_core/ops/quantized.py)."""

    scheme: str
    tensors: Mapping[str, HostArray]

    @property
    def kind(self) -> tuple[str, int, bool]:
        """Equal for codes that are packed together."""
        return self.scheme, self.tensors["scales"].shape[1], "mins" in self.tensors


def quantize(
    kernels: native.Native, weight: HostArray, bits: int, group: int
) -> dict[str, HostArray]:
    """As quantized.quantize, to the bit, for any float dtype."""
    given = from_host(weight)
    given = (given if given.dtype in DTYPES else given.float()).contiguous()
    n, k = given.shape
    codes, scales = np.empty((n, k), np.uint8), np.empty((n, k // group), np.float32)
    shape = native.Codes(n=n, k=k, group=group, bits=bits)
    is_finite = kernels.quantize(
        DTYPES[given.dtype], given.data_ptr(), ctypes.addressof(shape), codes.ctypes.data,
        scales.ctypes.data,
    )  # fmt: skip
    if not is_finite:
        raise WeightError("a weight that is to be quantised holds NaN or infinity")
    return {"codes": codes, "scales": scales}


def pack_codes(
    kernels: native.Native,
    parts: Sequence[Codes],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], Packed]:
    """Rows one below the other -> the arrays and the record of a Param for a model of `dtype`."""
    alike: list[list[Codes]] = []
    for part in parts:
        if alike and alike[-1][0].kind == part.kind:
            alike[-1].append(part)
        else:
            alike.append([part])
    n = sum(len(part.tensors["codes"]) for part in parts)
    arrays: dict[str, Tensor] = {}
    if bias is not None:
        arrays["bias"] = bias.to(torch.float32, copy=True)
    pieces: list[Piece] = []
    first = 0
    for number, some in enumerate(alike):
        tensors = {
            name: np.ascontiguousarray(np.concatenate([part.tensors[name] for part in some]))
            if len(some) > 1
            else np.ascontiguousarray(some[0].tensors[name])
            for name in some[0].tensors
        }
        own = _pack_alike(kernels, some[0].scheme, tensors)
        arrays |= {f"{name}{number or ''}": x for name, x in own.items()}
        rows, k = tensors["codes"].shape
        linear = native.Linear(
            packed=own["packed"].data_ptr(),
            scales=own["scales"].data_ptr(),
            mins=own["mins"].data_ptr() if "mins" in own else None,
            k=k,
            group=k // tensors["scales"].shape[1],
            bits=quantized.BITS[some[0].scheme],
            wide_inputs=int(quantized.is_weight_only(some[0].scheme)),
        )
        pieces.append(_piece(linear, arrays.get("bias"), first, rows, n, dtype))
        first += rows
    return arrays, Packed(n, k, dtype, tuple(pieces))


def _pack_alike(
    kernels: native.Native, scheme: str, tensors: Mapping[str, HostArray]
) -> dict[str, Tensor]:
    n, k = tensors["codes"].shape
    groups, bits = tensors["scales"].shape[1], quantized.BITS[scheme]
    lanes = -(-n // native.PANEL) * native.PANEL
    own = {"packed": memory.zeros(kernels.packed_code_bytes(bits, n, k))}
    for name in ("scales", "mins"):
        if name in tensors:
            own[name] = memory.zeros(lanes * groups * 4).view(torch.float32)
    codes = native.Codes(
        codes=tensors["codes"].ctypes.data,
        scales=tensors["scales"].ctypes.data,
        mins=tensors["mins"].ctypes.data if "mins" in tensors else None,
        n=n,
        k=k,
        group=k // groups,
        bits=bits,
    )
    kernels.pack_codes(
        ctypes.addressof(codes), own["packed"].data_ptr(), own["scales"].data_ptr(),
        own["mins"].data_ptr() if "mins" in own else None,
    )  # fmt: skip
    return own


def _piece(
    weight: native.Linear, bias: Tensor | None, first: int, rows: int, n: int, dtype: torch.dtype
) -> Piece:
    """The records of a piece of a weight of n rows; `weight` has what is the same in all."""

    def record(count: int, stride: int, out: torch.dtype, epilogue: str) -> native.Linear:
        own = native.Linear.from_buffer_copy(weight)
        own.bias = None if bias is None else bias.data_ptr() + first * bias.itemsize
        own.n, own.out_stride = count, stride
        own.dtype, own.out_dtype = DTYPES[dtype], DTYPES[out]
        own.epilogue = EPILOGUES[epilogue]
        return own

    gated = {}
    if rows == n and n % (2 * native.PANEL) == 0:
        gated = {kind: record(n // 2, n // 2, dtype, kind) for kind in ("silu", "gelu_tanh")}
    plain, wide = record(rows, n, dtype, "none"), record(rows, n, torch.float32, "none")
    addresses = {kind: ctypes.addressof(x) for kind, x in gated.items()}
    addresses |= {"plain": ctypes.addressof(plain), "wide": ctypes.addressof(wide)}
    return Piece(first, rows, plain, wide, gated, addresses)


def unpack(kernels: native.Native, facts: Packed, ids: Tensor | None = None) -> Tensor:
    """The plain rows `ids` (int32, contiguous) of the weight again, or all [n, k]."""
    if ids is None:
        out = torch.empty(facts.n, facts.k, dtype=facts.dtype)
        for piece in facts.pieces:
            own = out[piece.first : piece.first + piece.rows]
            kernels.unpack_rows(piece.addresses["plain"], None, piece.rows, own.data_ptr())
        return out
    if len(facts.pieces) > 1:
        return unpack(kernels, facts)[ids.long().clamp(0, facts.n - 1)]
    out = torch.empty((*ids.shape, facts.k), dtype=facts.dtype)
    address = facts.pieces[0].addresses["plain"]
    kernels.unpack_rows(address, ids.data_ptr(), ids.numel(), out.data_ptr())
    return out
