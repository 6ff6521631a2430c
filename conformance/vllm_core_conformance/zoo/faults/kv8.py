"""Wrong KV caches of 8 bits.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_core.backend import KV, AttentionPlan, AttentionSpec, KVGroup
from vllm_core.ops import Array, HostArray
from vllm_core_conformance.zoo.kernel import Row
from vllm_core_conformance.zoo.kv8 import Int8Kernel, Int8Runtime, Pool, View, single
from vllm_core_conformance.zoo.runtime import Collection

collection = Collection("quantised")
PROFILES = ("quantised",)


def kernel(says: str) -> Any:
    return collection.kernel(says, Int8Runtime, profiles=PROFILES)


# ---------------------------------------------------------------- scales
@kernel("the tokens of a step that fall into one block share a scale")
class KvScalePerBlock(Int8Kernel):
    def write(
        self, cache: Any, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        self.block_of = plan.arrays.slots // plan.group.block_tokens
        super().write(cache, layer, k, v, plan)

    def amax(self, x: HostArray) -> HostArray:
        own = super().amax(x)
        shared = np.zeros((self.block_of.max() + 1, own.shape[1]), own.dtype)
        np.maximum.at(shared, self.block_of, own)
        return np.asarray(shared[self.block_of])


@kernel("one scale for all that a step writes")
class KvScalePerStep(Int8Kernel):
    def amax(self, x: HostArray) -> HostArray:
        own = super().amax(x)
        return np.full_like(own, own.max())


@kernel("all heads of a token share a scale, and a block has room for these only")
class KvScaleOverHeads(Int8Kernel):
    def amax(self, x: HostArray) -> HostArray:
        own = super().amax(x)
        return np.broadcast_to(own.max(-1, keepdims=True), own.shape)

    def sizes(self, group: KVGroup) -> tuple[int, int]:
        codes, scales = super().sizes(group)
        return codes, scales // group.spec.num_kv_heads

    def view8(self, kv: KV, group: KVGroup) -> View:
        pool, (*rest, heads, dim) = kv[group.pool], self._shape(group)
        scales = pool.scales.reshape(-1, *rest, 1)
        wider = np.lib.stride_tricks.as_strided(
            scales, (*scales.shape[:-1], heads), (*scales.strides[:-1], 0)
        )
        return View(pool.codes.reshape(-1, *rest, heads, dim), wider)


@kernel("scales are kept in 16 bits")
class KvScaleInHalf(Int8Kernel):
    def scale8(self, amax: HostArray) -> HostArray:
        with np.errstate(over="ignore"):
            return super().scale8(amax).astype(np.float16).astype(single)


@kernel("scales never fall below a small number, and small vectors become zeros")
class KvScaleWithFloor(Int8Kernel):
    def scale8(self, amax: HostArray) -> HostArray:
        return np.maximum(super().scale8(amax), single(1e-5))


@kernel("the largest value, not magnitude, makes the scale")
class KvScaleOfLargestValue(Int8Kernel):
    def amax(self, x: HostArray) -> HostArray:
        return np.asarray(np.maximum(x.max(-1), single(0)))


@kernel("the scale of a slot that was in use before only grows")
class KvStaleScale(Int8Kernel):
    def write_scales(
        self,
        cache: View,
        layer: int,
        which: int,
        blocks: HostArray,
        offsets: HostArray,
        scales: HostArray,
    ) -> None:
        old = cache.scales[blocks, layer, which, offsets]
        cache.scales[blocks, layer, which, offsets] = np.fmax(old, scales)


@kernel("keys are read with the scales of values")
class KvScalesOfValues(Int8Kernel):
    def scales_of(
        self,
        cache: View,
        layer: int,
        which: int,
        blocks: HostArray,
        offsets: HostArray,
        plan: AttentionPlan,
    ) -> HostArray:
        return super().scales_of(cache, layer, 1, blocks, offsets, plan)


@kernel("the scale is read of the neighbouring head")
class KvScaleOfNextHead(Int8Kernel):
    def scales_of(
        self,
        cache: View,
        layer: int,
        which: int,
        blocks: HostArray,
        offsets: HostArray,
        plan: AttentionPlan,
    ) -> HostArray:
        return np.roll(super().scales_of(cache, layer, which, blocks, offsets, plan), 1, -1)


@kernel("under a window all tokens are read with the scale of the first")
class KvWindowScale(Int8Kernel):
    def scales_of(
        self,
        cache: View,
        layer: int,
        which: int,
        blocks: HostArray,
        offsets: HostArray,
        plan: AttentionPlan,
    ) -> HostArray:
        found = super().scales_of(cache, layer, which, blocks, offsets, plan)
        return found if plan.spec.window is None else np.broadcast_to(found[:1], found.shape)


@kernel("scales of slots past the end are multiplied with a weight of 0")
class KvUnusedScales(Int8Kernel):
    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        own = super().keys_of(row, spec)
        if len(own) == 0:
            return own
        end = -(-(int(own[-1]) + 1) // row.block_tokens) * row.block_tokens
        return np.arange(own[0], end)


# ---------------------------------------------------------------- codes
@kernel("codes are cut off towards zero")
class KvCodesCutOff(Int8Kernel):
    def rounded8(self, x: HostArray) -> HostArray:
        return np.trunc(x)


@kernel("codes end at 126")
class KvCodesTo126(Int8Kernel):
    def codes8(self, x: HostArray, scales: HostArray) -> HostArray:
        return np.clip(super().codes8(x, scales), -126, 126)


@kernel("codes are made with 128 steps, and the largest is cut off")
class KvCodesOf128(Int8Kernel):
    def scale8(self, amax: HostArray) -> HostArray:
        return super().scale8(amax) * (single(127) / single(128))


@kernel("codes are read as if they had no sign")
class KvCodesUnsigned(Int8Kernel):
    def values(self, codes: HostArray, scales: HostArray) -> HostArray:
        return super().values(codes.view(np.uint8), scales)


@kernel("a maximum that passes over NaN makes the scale, and NaN has code 0")
class KvNanPassedOver(Int8Kernel):
    def quantised(self, x: HostArray) -> tuple[HostArray, HostArray]:
        return super().quantised(np.where(np.isfinite(x), x, np.zeros_like(x)))


@kernel("the tokens of the step are attended as they came, not as the cache holds them")
class KvStepUnquantised(Int8Kernel):
    def write(
        self, cache: Any, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        super().write(cache, layer, k, v, plan)
        self.fresh = k.astype(single), v.astype(single)

    def gather(
        self, cache: Any, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        found = super().gather(cache, layer, row, j, plan)
        if isinstance(cache, View):
            own = j >= row.cached
            for read, fresh in zip(found, self.fresh):
                read[own] = fresh[row.first + j[own] - row.cached]
        return found


# ---------------------------------------------------------------- blocks
@kernel("a copied block has the scales of what it held before")
class KvCopyWithoutScales(Int8Kernel):
    def copy_scales(self, pool: Pool, src: Array, dst: Array) -> None:
        return


@kernel("imported codes are taken for values of scale 1")
class KvImportWithoutScales(Int8Kernel):
    def imported_scales(self, scales: HostArray) -> HostArray:
        return np.ones_like(scales)


@kernel("imported scales go to the blocks in the order of their ids")
class KvImportSorted(Int8Kernel):
    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        kv = super().import_blocks(kv, group, ids, arrays)
        if self.is_int8(group):
            scales = self.view8(kv, group).scales
            scales[sorted(ids)] = scales[list(ids)].copy()
        return kv


@kernel("export gives values, without scales")
class KvExportsValues(Int8Kernel):
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        found = super().export_blocks(kv, group, ids)
        if not self.is_int8(group):
            return found
        return {name: self.values(found[name], found[f"{name}_scale"]) for name in ("k", "v")}


FAULTS = tuple(collection.faults)
