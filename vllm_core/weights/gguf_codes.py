"""Codes of quantised GGUF tensors, straight from their bits.

Dequantising what comes out gives, bit for bit, what the gguf library dequantises.

Knows: blocks of 4 to 8 bits; those of 5 and 6 become codes of 8. Does not know: files, names.

Source: ggml-quants.c of llama.cpp; a test compares with the gguf library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from vllm_core.ops import HostArray
from vllm_core.weights.source import CodeFormat

Decoded: TypeAlias = "tuple[HostArray, HostArray, HostArray | None]"
"""codes [rows, blocks, block], scales [rows, blocks, groups of a block], mins alike or None."""

FORMATS = {
    "Q4_0": CodeFormat("int4", 32),
    "Q4_1": CodeFormat("int4", 32, has_mins=True),
    "Q4_K": CodeFormat("int4", 32, has_mins=True),
    "Q5_0": CodeFormat("int8", 32),
    "Q5_1": CodeFormat("int8", 32, has_mins=True),
    "Q5_K": CodeFormat("int8", 32, has_mins=True),
    "Q6_K": CodeFormat("int8", 16),
    "Q8_0": CodeFormat("int8", 32),
}
"""By the type's name in GGUF."""
_BLOCK_BYTES = {
    "Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q5_0": 22, "Q5_1": 24, "Q5_K": 176, "Q6_K": 210,
    "Q8_0": 34,
}  # fmt: skip


def decode(kind: str, data: HostArray) -> dict[str, HostArray]:
    """uint8 [rows, bytes of a row] of a type in FORMATS -> its arrays as `ops.quantized` has
    them."""
    rows = data.shape[0]
    blocks = np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1, _BLOCK_BYTES[kind])
    codes, scales, mins = _DECODERS[kind](blocks)
    found = {"codes": codes, "scales": scales}
    if mins is not None:
        found["mins"] = mins
    return {name: np.ascontiguousarray(x.reshape(rows, -1)) for name, x in found.items()}


def _halves(blocks: HostArray, at: int) -> HostArray:
    """The float16 at a byte of each block, float32 [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(bytes_: HostArray) -> HostArray:
    """[..., n] -> [..., 2 n]: all low halves, then all high ones."""
    return np.concatenate((bytes_ & np.uint8(15), bytes_ >> np.uint8(4)), -1)


def _q4_0(blocks: HostArray) -> Decoded:
    return _nibbles(blocks[..., 2:]), _halves(blocks, 0), None


def _q4_1(blocks: HostArray) -> Decoded:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: HostArray) -> Decoded:
    return blocks[..., 2:] ^ np.uint8(0x80), _halves(blocks, 0), None  # signed, plus 128


def _fifth_bits(bytes_: HostArray) -> HostArray:
    """4 bytes, a bit for each of 32 codes -> what it adds to its code."""
    return np.unpackbits(bytes_, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: HostArray) -> Decoded:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return codes + np.uint8(128 - 16), _halves(blocks, 0), None


def _q5_1(blocks: HostArray) -> Decoded:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return codes, _halves(blocks, 0), _halves(blocks, 2)


def _q4_k(blocks: HostArray) -> Decoded:
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return codes, *_six_bits(blocks)


def _q5_k(blocks: HostArray) -> Decoded:
    """As Q4_K; bit g of byte i is the fifth of code i of group g."""
    shape = blocks.shape[:2]
    low = _nibbles(blocks[..., 48:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32)
    bits = blocks[..., 16:48].reshape(*shape, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None]
    return low | ((bits & np.uint8(1)) << np.uint8(4)), *_six_bits(blocks)


def _six_bits(blocks: HostArray) -> tuple[HostArray, HostArray]:
    """Scales and mins of 8 groups of 32, 6 bits each: the first four whole, of the others the low 4
    bits apart from the high 2, which stand above the first four."""
    packed = blocks[..., 4:16].reshape(*blocks.shape[:2], 3, 4)
    first, second, low = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    six, two, four = np.uint8(63), np.uint8(48), np.uint8(15)
    scales = np.concatenate((first & six, (low & four) | ((first >> np.uint8(2)) & two)), -1)
    mins = np.concatenate(
        (second & six, (low >> np.uint8(4)) | ((second >> np.uint8(2)) & two)), -1
    )
    scale, least = _halves(blocks, 0), _halves(blocks, 2)
    return scale * scales.astype(np.float32), -(least * mins.astype(np.float32))


def _q6_k(blocks: HostArray) -> Decoded:
    """16 groups of 16 codes; 4 bits of each in one place, 2 in another; 8-bit scales."""
    shape = blocks.shape[:2]
    low = _nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    codes = (low | (high << np.uint8(4))) + np.uint8(128 - 32)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    return codes, _halves(blocks, 208) * scales, None


_DECODERS: dict[str, Callable[[HostArray], Decoded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
}
