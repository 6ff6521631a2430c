"""Wrong products with weights of few bits.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.ops import Array, HostArray, Param, ParamSpec, Part, quantized
from vllm_core_conformance.zoo.coded import Coded, CodedOps, CodedRuntime, schemes_of, single
from vllm_core_conformance.zoo.kernel import wide
from vllm_core_conformance.zoo.runtime import Collection

collection = Collection("quantised")
PROFILES = ("quantised",)


def ops(says: str) -> Any:
    return collection.ops(says, CodedRuntime, profiles=PROFILES)


def runtime(says: str) -> Any:
    return collection.runtime(says, profiles=PROFILES)


# ---------------------------------------------------------------- codes, scales, mins
@ops("groups are always taken for 128 inputs")
class GroupOf128Always(CodedOps):
    def scale_of(self, part: Coded, at: int) -> Array:
        return super().scale_of(part, min(at * part.group // 128, part.num_groups - 1))


@ops("two groups of 16 share the scale of the first")
class GroupOf16AsOf32(CodedOps):
    def scale_of(self, part: Coded, at: int) -> Array:
        return super().scale_of(part, at // 2 * 2 if part.group == 16 else at)


@ops("the scale is that of the row before")
class ScaleOfNeighbourRow(CodedOps):
    def scale_of(self, part: Coded, at: int) -> Array:
        return np.roll(super().scale_of(part, at), 1)


@ops("in the last tile of rows, which is not full, scales are those of the tile before")
class ScaleOfTileBefore(CodedOps):
    def scale_of(self, part: Coded, at: int) -> Array:
        scales = np.array(super().scale_of(part, at))
        whole, rest = len(scales) // 64 * 64, len(scales) % 64
        if whole:
            scales[whole:] = scales[whole - 64 : whole - 64 + rest]
        return scales


@ops("scales lose their sign")
class ScaleWithoutSign(CodedOps):
    def scale_of(self, part: Coded, at: int) -> Array:
        return np.abs(super().scale_of(part, at))


@ops("scales are kept in bfloat16, and unload tells the values of the file")
class ScaleInBfloat16(CodedOps):
    def scale_of(self, part: Coded, at: int) -> Array:
        bits = np.ascontiguousarray(super().scale_of(part, at)).view(np.uint32)
        return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(single)


@ops("the two codes of a byte are swapped")
class NibblesSwapped(CodedOps):
    def codes_of(self, part: Coded) -> Array:
        codes = super().codes_of(part)
        if part.bits == 8:
            return codes
        return codes.reshape(len(codes), -1, 2)[..., ::-1].reshape(codes.shape)


@ops("codes of 8 bits are signed from -127 on: the least is read as the one above")
class LeastCodeCutOff(CodedOps):
    def codes_of(self, part: Coded) -> Array:
        return np.maximum(super().codes_of(part), 1 if part.bits == 8 else 0)


@ops("mins are ignored")
class MinsIgnored(CodedOps):
    def offset_of(self, part: Coded, at: int) -> Array:
        return super().offset_of(part, at) * (part.mins is None)


@ops("mins are subtracted, as some files have them")
class MinsSubtracted(CodedOps):
    def offset_of(self, part: Coded, at: int) -> Array:
        return super().offset_of(part, at) * (1 if part.mins is None else -1)


@ops("4 bits without mins have the zero point of 7.5, between two codes")
class ZeroBetweenCodes(CodedOps):
    def zero_of(self, part: Coded) -> Any:
        return 7.5 if part.bits == 4 else super().zero_of(part)


@ops("the last group of a row is not summed where there is more than one")
class LastGroupDropped(CodedOps):
    def groups_of(self, part: Coded) -> Sequence[int]:
        return range(max(1, part.num_groups - 1))


@ops("the last group of a row is not summed where their number is odd")
class OddGroupDropped(CodedOps):
    def groups_of(self, part: Coded) -> Sequence[int]:
        return range(max(1, part.num_groups // 2 * 2))


# ---------------------------------------------------------------- inputs
@ops("inputs get one scale per token")
class OneScalePerToken(CodedOps):
    def inputs(self, x: Array, part: Coded) -> tuple[Array, Array]:
        return self.quantised(x, x.shape[1])


@ops("codes of inputs are cut off towards zero")
class InputsCutOff(CodedOps):
    def rounded(self, x: Array) -> Array:
        return np.trunc(x)


@ops("the scale of inputs is made of their largest value, not magnitude")
class LargestValueScalesInputs(CodedOps):
    def amax_of(self, parts: Array) -> Array:
        return np.maximum(parts.max(-1, keepdims=True), single(1e-6))

    def rounded(self, x: Array) -> Array:
        return np.clip(np.rint(x), -128, 127)


@ops("a maximum that passes over NaN scales the inputs, whose codes are then 0")
class NanPassedOver(CodedOps):
    def amax_of(self, parts: Array) -> Array:
        finite = np.where(np.isfinite(parts), parts, single(0))
        return np.abs(finite).max(-1, keepdims=True)

    def rounded(self, x: Array) -> Array:
        return np.nan_to_num(np.rint(x), nan=0, posinf=127, neginf=-127)


@ops("from the second tile of 8 tokens on, inputs have the scales of the first")
class ScalesOfFirstTile(CodedOps):
    def quantised(self, x: Array, group: int) -> tuple[Array, Array]:
        codes, scales = super().quantised(x, group)
        if len(x) > 8:
            scales[8:] = np.resize(scales[:8], scales[8:].shape)
        return codes, scales


@ops("weight-only schemes quantise their inputs as the others do")
class WeightOnlyForgotten(CodedOps):
    def part(self, x: Array, part: Coded) -> Array:
        return super().part(x, Coded(part.scheme.removesuffix("-weight-only"), part.arrays))


@ops("few tokens are multiplied in 16 bits without saying so")
class FewTokensInHalf(CodedOps):
    def part(self, x: Array, part: Coded) -> Array:
        if len(x) > 2 or part.codes is None:
            return super().part(x, part)
        halves = self.values(part).astype(np.float16).astype(single)
        return wide(x).astype(np.float16).astype(single) @ halves.T


# ---------------------------------------------------------------- sums
@ops("sums of two products of bytes end at 32,767")
class PairsSaturate(CodedOps):
    def summed(self, x: Array, scales: Array, part: Coded) -> Array:
        if part.bits == 4 or part.scheme.endswith("-weight-only"):
            return super().summed(x, scales, part)
        codes, group = self.codes_of(part), part.group
        out = np.zeros((len(x), len(codes)), single)
        per = part.num_groups // scales.shape[1]
        for at in range(part.num_groups):
            some = slice(at * group, (at + 1) * group)
            total = np.zeros_like(out)
            for i in range(at * group, (at + 1) * group, 2):
                total += np.clip(x[:, i : i + 2] @ codes[:, i : i + 2].T, -32768, 32767)
            own = scales[:, at // per, None]
            out += total * own * self.scale_of(part, at)
            out += x[:, some].sum(-1, keepdims=True) * own * self.offset_of(part, at)
        return out


@ops("rows behind the last whole tile of 64 are left 0")
class RowsPastTile(CodedOps):
    def part(self, x: Array, part: Coded) -> Array:
        out = super().part(x, part)
        if part.codes is not None and out.shape[1] > 64:
            out[:, out.shape[1] // 64 * 64 :] = 0
        return out


@ops("a product of one token leaves its bias out")
class BiasOfOneToken(CodedOps):
    def product(self, x: Array, param: Param) -> Array:
        if len(x) > 1 or "bias" not in param.arrays:
            return super().product(x, param)
        arrays = {name: array for name, array in param.arrays.items() if name != "bias"}
        return super().product(x, Param(arrays, param.static))


@ops("the second half of a gated product has the scales of the first")
class GateScalesTwice(CodedOps):
    def gated_linear(self, x: Array, param: Param, kind: str) -> Array:
        first = {k: v for k, v in param.arrays.items() if k.startswith("0.scales")}
        second = {
            k.replace("0.", "1.", 1): v for k, v in first.items() if "1.codes" in param.arrays
        }
        return super().gated_linear(x, Param(param.arrays | second, param.static), kind)


@ops("all parts are read as the first one's scheme")
class FirstSchemeForAll(CodedOps):
    def linear(self, x: Array, param: Param) -> Array:
        if param.static == "dense":
            return super().linear(x, param)
        schemes = schemes_of(param)
        same = tuple(s if s == "dense" else schemes[0] for s in schemes)
        return super().linear(x, Param(param.arrays, ("codes", same)))


# ---------------------------------------------------------------- tables
@ops("rows of a table have the scale of their first group")
class EmbedFirstScale(CodedOps):
    def values(self, part: Coded) -> Array:
        scales = np.broadcast_to(part["scales"][:, :1], part["scales"].shape)
        return super().values(Coded(part.scheme, part.arrays | {"scales": scales}))


@ops("the last row of a table is looked up one too early")
class EmbedLastRow(CodedOps):
    def embed(self, ids: Array, param: Param) -> Array:
        if param.static != "dense":
            ids = np.minimum(ids, len(param["0.codes"]) - 2)
        return super().embed(ids, param)


@ops("logits of codes are rounded to the model's dtype and ten bits at most")
class LogitsOfTenBits(CodedOps):
    def logits(self, x: Array, param: Param) -> Array:
        out = super().logits(x, param)
        return out if param.static == "dense" else out.astype(np.float16).astype(single)


# ---------------------------------------------------------------- quantised at load
class Quantises(CodedRuntime):
    """Dense rows by another quantiser."""

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        if spec.scheme not in quantized.BITS:
            return super().load(spec, parts)
        bits = quantized.BITS[spec.scheme]
        changed = []
        for part in parts:
            tensors: Any = dict(part.tensors)
            weight = np.asarray(tensors.pop("weight")).astype(single)
            group = spec.group or quantized.group_for(bits, weight.shape[1]) or 1
            tensors |= self.quantised(weight, bits, group)
            changed.append(Part(spec.scheme, tensors, part.rows))
        return super().load(spec, changed)

    def quantised(self, weight: HostArray, bits: int, group: int) -> dict[str, HostArray]:
        return quantized.quantize(weight, bits, group)


@runtime("a dense weight is quantised in the usual group, whichever is asked for")
class GroupPassedOver(CodedRuntime):
    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        return super().load(replace(spec, group=None), parts)


@runtime("a dense weight is quantised with one scale per row")
class OneScalePerRow(Quantises):
    def quantised(self, weight: HostArray, bits: int, group: int) -> dict[str, HostArray]:
        return quantized.quantize(weight, bits, weight.shape[1])


@runtime("a dense weight is cut off towards zero")
class WeightsCutOff(Quantises):
    def quantised(self, weight: HostArray, bits: int, group: int) -> dict[str, HostArray]:
        found = quantized.quantize(weight, bits, group)
        scales = np.repeat(found["scales"], group, 1)
        steps = np.trunc(weight / np.where(scales == 0, single(1), scales))
        zero = quantized.zero_of(bits)
        return found | {"codes": np.clip(steps + zero, 0, 2 * zero - 1).astype(np.uint8)}


@runtime("4 bits are made with the largest magnitude over 7, and negative ones cut off below -7")
class SevenSteps(Quantises):
    def quantised(self, weight: HostArray, bits: int, group: int) -> dict[str, HostArray]:
        if bits == 8:
            return super().quantised(weight, bits, group)
        parts = weight.reshape(len(weight), -1, group)
        scales = np.abs(parts).max(-1) / single(7)
        steps = np.rint(parts / np.where(scales == 0, single(1), scales)[..., None])
        codes = np.clip(steps + 8, 1, 15).astype(np.uint8)
        return {"codes": codes.reshape(weight.shape), "scales": scales}


@runtime("parts of a fused weight that are quantised at load are stored in reverse")
class QuantisedReversed(CodedRuntime):
    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        return super().load(spec, parts if spec.scheme == "dense" else parts[::-1])


FAULTS = tuple(collection.faults)
