"""Attention that sees the right keys and computes wrongly: scale, cap, softmax, merge, rounding.

Knows: our kernel's steps. Does not know: cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.backend import AttentionPlan, AttentionSpec
from vllm_core.ops import HostArray
from vllm_core_conformance.zoo.faults import hybrid
from vllm_core_conformance.zoo.kernel import Kernel, Row, Sums
from vllm_core_conformance.zoo.runtime import BFLOAT16, Collection

collection = Collection("attention")
kernel = collection.kernel


# ---------------------------------------------------------------- scale, cap, sinks
@kernel("the scale of the layer is ignored for D^-1/2", worst=True)
class ScaleIgnored(Kernel):
    def scale(self, spec: AttentionSpec) -> float:
        return float(spec.dim_qk**-0.5)


@kernel("the scale is corrected for the head size padded to 32")
class ScaleOfPaddedDim(Kernel):
    def scale(self, spec: AttentionSpec) -> float:
        return float(spec.scale * (spec.dim_qk / (-(-spec.dim_qk // 32) * 32)) ** 0.5)


@kernel("softcap is ignored", worst=True)
class SoftcapIgnored(Kernel):
    def cap(self, score: HostArray, softcap: float) -> HostArray:
        return score


@kernel("softcap comes before the scale")
class SoftcapBeforeScale(Kernel):
    def scores(
        self, q: HostArray, keys: HostArray, seen: HostArray, row: Row, spec: AttentionSpec
    ) -> HostArray:
        score = self.dot(q, keys)
        if spec.softcap is not None:
            score = self.cap(score, spec.softcap)
        return self.masked(score * np.asarray(spec.scale, q.dtype), seen)


@kernel("softcap comes after the masks, so that masked keys have the score -softcap")
class SoftcapAfterMask(Kernel):
    def scores(
        self, q: HostArray, keys: HostArray, seen: HostArray, row: Row, spec: AttentionSpec
    ) -> HostArray:
        score = self.masked(self.dot(q, keys) * np.asarray(spec.scale, q.dtype), seen)
        return score if spec.softcap is None else self.cap(score, spec.softcap)


@kernel("softcap is not divided by before tanh")
class SoftcapUndivided(Kernel):
    def cap(self, score: HostArray, softcap: float) -> HostArray:
        return softcap * np.tanh(score)


@kernel("tanh of the softcap is the device's approximation, good to 11 bits")
class ApproximateTanh(Kernel):
    def cap(self, score: HostArray, softcap: float) -> HostArray:
        y = np.tanh(score / softcap)
        return softcap * (np.round(y * 2048) / 2048).astype(score.dtype)


@kernel("the sink is ignored", worst=True)
class SinkIgnored(Kernel):
    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        return sums


@kernel("the sink is in the maximum but not in the sum")
class SinkNotInSum(Kernel):
    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        return super().with_sink(sums, np.full_like(sink, -np.inf))


@kernel("the sink is added once per part of the keys")
class SinkPerSplit(Kernel):
    SPLITS = 3

    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        return super().with_sink(sums, sink + np.log(sink.dtype.type(3)))


@kernel("sinks of the heads are read in the order (place in group, KV head)")
class SinksPermuted(Kernel):
    group = 1

    def kv_heads(self, spec: AttentionSpec) -> HostArray:
        self.group = spec.queries_per_kv
        return super().kv_heads(spec)

    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        return super().with_sink(sums, sink.reshape(-1, self.group).T.reshape(-1, 1))


@kernel("the sink is taken as a logarithm to base 2")
class SinkInBase2(Kernel):
    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        return super().with_sink(sums, sink * sink.dtype.type(np.log(2)))


@kernel("the sink is scaled like a score")
class SinkScaled(Kernel):
    factor = 1.0

    def scale(self, spec: AttentionSpec) -> float:
        self.factor = spec.scale
        return spec.scale

    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        return super().with_sink(sums, sink * sink.dtype.type(self.factor))


# ---------------------------------------------------------------- softmax and merge
@kernel("no maximum is subtracted before exp", worst=True)
class NoMaximum(Kernel):
    def update(self, sums: Sums, score: HostArray, values: HostArray) -> Sums:
        p = np.exp(score)
        zero = np.zeros_like(sums.top)
        return Sums(zero, sums.total + p.sum(-1), sums.out + p @ values)


@kernel("masked scores are -10000 instead of -inf, and huge scores lie below")
class MaskOf10000(Kernel):
    def masked(self, score: HostArray, seen: HostArray) -> HostArray:
        return np.where(seen, score, -1e4).astype(score.dtype)


@kernel("masked scores lose 20 instead of everything")
class MaskSubtracts20(Kernel):
    def masked(self, score: HostArray, seen: HostArray) -> HostArray:
        return np.where(seen, score, score - 20).astype(score.dtype)


@kernel("the values gathered so far are not rescaled when a later tile has a larger score")
class OutputNotRescaled(Kernel):
    def update(self, sums: Sums, score: HostArray, values: HostArray) -> Sums:
        new = super().update(sums, score, values)
        p = np.exp(score - np.where(new.top > -np.inf, new.top, 0)[..., None])
        return new._replace(out=sums.out + p @ values)


@kernel("a tile whose scores all lie 6 below the largest is skipped")
class SkipsSmallTiles(Kernel):
    TILE = 32

    def update(self, sums: Sums, score: HostArray, values: HostArray) -> Sums:
        small = (score.max(-1) < sums.top - 6)[..., None]
        return super().update(sums, np.where(small, -np.inf, score).astype(score.dtype), values)


@kernel("parts of the keys are merged by their largest scores instead of their sums")
class MergeByMaximum(Kernel):
    SPLITS = 2

    def merged(self, parts: list[Sums]) -> Sums:
        level = [p._replace(total=p.total / p.total, out=self.divided(p)) for p in parts]
        return super().merged(level)


@kernel("the last part of the keys is left out when a row is split")
class SplitDropped(Kernel):
    def splits(self, num_keys: int) -> list[range]:
        return [range(i, min(num_keys, i + 256)) for i in range(0, max(1, num_keys), 256)]

    def merged(self, parts: list[Sums]) -> Sums:
        return super().merged(parts[: max(1, len(parts) - 1)])


@kernel("the parts of a row are averaged instead of weighed by their sums")
class SplitsAveraged(Kernel):
    SPLITS = 2

    def merged(self, parts: list[Sums]) -> Sums:
        level = [Sums(p.top * 0, p.total / p.total, p.out / p.total[..., None]) for p in parts]
        return super().merged(level)._replace(top=parts[0].top)


@kernel("the largest score starts at 0, so that rows of very negative scores vanish")
class MaximumStartsAtZero(Kernel):
    def empty(self, queries: HostArray, spec: AttentionSpec) -> Sums:
        sums = super().empty(queries, spec)
        return sums._replace(top=np.zeros_like(sums.top))


# ---------------------------------------------------------------- log-sum-exp
@kernel("the log-sum-exp is to base 2")
class LseInBase2(Kernel):
    def lse(self, sums: Sums) -> HostArray:
        return super().lse(sums) / np.float32(np.log(2))


@kernel("the log-sum-exp lacks the maximum")
class LseWithoutMaximum(Kernel):
    def lse(self, sums: Sums) -> HostArray:
        return np.log(sums.total)


@kernel("the log-sum-exp is the largest score")
class LseIsMaximum(Kernel):
    def lse(self, sums: Sums) -> HostArray:
        return sums.top


@kernel("the log-sum-exp is rounded to bfloat16")
class LseOf16Bits(Kernel):
    def lse(self, sums: Sums) -> HostArray:
        return super().lse(sums).astype(BFLOAT16).astype(np.float32)


@kernel("the log-sum-exp is laid out head by head")
class LseTransposed(Kernel):
    def attend(self, *args: Any, **more: Any) -> Any:
        out, lse, kv = super().attend(*args, **more)
        return out, None if lse is None else lse.T.reshape(lse.shape), kv


# ---------------------------------------------------------------- few bits
@kernel("scores are rounded to bfloat16 in a model of 32 and 16 bits")
class ScoresOf16Bits(Kernel):
    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        return super().dot(q, keys).astype(BFLOAT16).astype(q.dtype)


@kernel("the dot product multiplies in 10 bits of mantissa, as fast matrix units do")
class DotOf10Bits(Kernel):
    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        return super().dot(_ten_bits(q), _ten_bits(keys))


@kernel("dot products are float16 before the scale, and overflow")
class DotOverflowsIn16Bits(Kernel):
    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        return super().dot(q, keys).astype(np.float16).astype(q.dtype)


@kernel("values are accumulated in the model's 16 bits from tile to tile")
class ValuesAccumulatedIn16Bits(Kernel):
    TILE = 16

    def update(self, sums: Sums, score: HostArray, values: HostArray) -> Sums:
        new = super().update(sums, score, values)
        return new._replace(out=new.out.astype(self.dtype).astype(new.out.dtype))


@kernel("the sum of the probabilities is accumulated in the model's 16 bits")
class SumOf16Bits(Kernel):
    TILE = 16

    def update(self, sums: Sums, score: HostArray, values: HostArray) -> Sums:
        new = super().update(sums, score, values)
        return new._replace(total=new.total.astype(self.dtype).astype(new.total.dtype))


@kernel("results of 16 bits are cut off instead of rounded")
class OutputTruncated(Kernel):
    def rounded(self, out: HostArray, dtype: np.dtype[Any]) -> HostArray:
        if dtype != BFLOAT16:
            return super().rounded(out, dtype)
        bits = np.ascontiguousarray(out).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(BFLOAT16)


@kernel("log2 e has four digits")
class ShortLog2e(Kernel):
    def exp(self, x: HostArray) -> HostArray:
        return np.asarray(np.exp2(x * x.dtype.type(1.4427)))


@kernel("keys and values are held in bfloat16 whatever the model's dtype")
class CacheOf16Bits(Kernel):
    def stored(self, x: HostArray) -> HostArray:
        return x.astype(BFLOAT16).astype(x.dtype)


@kernel("the scale is rounded to bfloat16")
class ScaleOf16Bits(Kernel):
    def scale(self, spec: AttentionSpec) -> float:
        return float(np.asarray(spec.scale).astype(BFLOAT16))


# ---------------------------------------------------------------- order of write and read
@kernel("K and V of the step are written after the attention reads", worst=True)
class WritesAfterReads(Kernel):
    def attend(self, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        stale = tuple(np.array(pool) for pool in kv)
        _, _, kv = super().attend(kv, layer, q, k, v, plan, **more)
        out, lse, _ = _Reader(self.dtype.name).attend(stale, layer, q, k, v, plan, **more)
        return out, lse, kv


class _Reader(Kernel):
    def write(
        self, cache: HostArray, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        """It only reads."""


def _ten_bits(x: HostArray) -> HostArray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype)


FAULTS = (*collection.faults, *hybrid.FAULTS)
