"""A runtime over numpy whose KV cache may be codes of 8 bits with a scale per token and head.

Its methods are cut where kernels go wrong, for the faults; as it stands it is honest.

Knows: the format, the kernel that it is put under. Does not know: which mistakes there are, cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from vllm_core.backend import INT8_KV, KV, AttentionPlan, KVGroup
from vllm_core.errors import NotSupported
from vllm_core.ops import Array, HostArray
from vllm_core_conformance.zoo.kernel import Kernel, Row
from vllm_core_conformance.zoo.runtime import BucketRuntime, ZooRuntime

single = np.float32
MOST = single(127)


class Pool(NamedTuple):
    """Of one pool of 8 bits; the block stays first."""

    codes: HostArray  # int8 [num_blocks, layers * 2 * BT * Hkv * D]
    scales: HostArray  # float32 [num_blocks, layers * 2 * BT * Hkv]


@dataclass(frozen=True)
class View:
    """Of one group."""

    codes: HostArray
    """[num_blocks, layers, 2, BT, Hkv, D]"""
    scales: HostArray
    """[num_blocks, layers, 2, BT, Hkv]"""


class Int8Kernel(Kernel):
    """Codes become values when they are read."""

    def is_int8(self, group: KVGroup) -> bool:
        return group.spec.kv == INT8_KV

    # ---- the cache
    def sizes(self, group: KVGroup) -> tuple[int, int]:
        """Codes and scales of a block."""
        shape = self._shape(group)
        return int(np.prod(shape)), int(np.prod(shape[:-1]))

    def block_bytes(self, group: KVGroup) -> int:
        if not self.is_int8(group):
            return super().block_bytes(group)
        codes, scales = self.sizes(group)
        return codes + 4 * scales

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        plain = [group for group in groups if not self.is_int8(group)]
        numbers = sorted({group.pool for group in plain})
        pools: dict[int, Any] = dict(zip(numbers, super().alloc(plain, num_blocks)))
        for group in groups:
            if not self.is_int8(group):
                continue
            if group.spec.dim_v != group.spec.dim_qk:
                raise NotSupported("this layout needs V heads as wide as K heads")
            count, (codes, scales) = num_blocks[group.pool], self.sizes(group)
            pools[group.pool] = Pool(
                np.full((count, codes), -128, np.int8), np.full((count, scales), np.nan, single)
            )
        return tuple(pools[pool] for pool in sorted(pools))

    def layout_fingerprint(self, group: KVGroup) -> str:
        own = super().layout_fingerprint(group)
        return f"{own} int8 and scales" if self.is_int8(group) else own

    def view8(self, kv: KV, group: KVGroup) -> View:
        pool, shape = kv[group.pool], self._shape(group)
        return View(pool.codes.reshape(-1, *shape), pool.scales.reshape(-1, *shape[:-1]))

    def _view(self, kv: KV, group: KVGroup) -> Any:
        return self.view8(kv, group) if self.is_int8(group) else super()._view(kv, group)

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        if not self.is_int8(group):
            return super().export_blocks(kv, group, ids)
        view, found = self.view8(kv, group), {}
        for which, name in enumerate(("k", "v")):
            found[name] = np.moveaxis(view.codes[list(ids), :, which], 1, 0).copy()
            found[f"{name}_scale"] = np.moveaxis(view.scales[list(ids), :, which], 1, 0).copy()
        return found

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        if not self.is_int8(group):
            return super().import_blocks(kv, group, ids, arrays)
        view = self.view8(kv, group)
        for which, name in enumerate(("k", "v")):
            view.codes[list(ids), :, which] = np.moveaxis(arrays[name], 0, 1)
            scales = np.moveaxis(arrays[f"{name}_scale"], 0, 1)
            view.scales[list(ids), :, which] = self.imported_scales(scales)
        return kv

    def imported_scales(self, scales: HostArray) -> HostArray:
        """[ids, layers, BT, Hkv]"""
        return scales

    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        if not self.is_int8(group):
            return super().copy_blocks(kv, group, src, dst)
        pool = kv[group.pool]
        pool.codes[dst] = pool.codes[src]
        self.copy_scales(pool, src, dst)
        return kv

    def copy_scales(self, pool: Pool, src: Array, dst: Array) -> None:
        pool.scales[dst] = pool.scales[src]

    # ---- numbers
    def amax(self, x: HostArray) -> HostArray:
        """x [T, Hkv, D] float32 -> [T, Hkv]; NaN of what holds one."""
        found: HostArray = np.abs(x).max(-1)
        return found

    def scale8(self, amax: HostArray) -> HostArray:
        return np.where(np.isfinite(amax), amax / MOST, single(np.nan))

    def codes8(self, x: HostArray, scales: HostArray) -> HostArray:
        """[T, Hkv, D], whole numbers in float32."""
        divisor = np.where(scales > 0, scales, single(1))[..., None]
        return np.clip(self.rounded8(x / divisor), -MOST, MOST)

    def rounded8(self, x: HostArray) -> HostArray:
        return np.rint(x)

    def quantised(self, x: HostArray) -> tuple[HostArray, HostArray]:
        """[T, Hkv, D] -> codes int8, scales."""
        x = x.astype(single)
        scales = self.scale8(self.amax(x))
        codes = np.where((scales > 0)[..., None], self.codes8(x, scales), single(0))
        return codes.astype(np.int8), scales

    def values(self, codes: HostArray, scales: HostArray) -> HostArray:
        found: HostArray = codes.astype(single) * scales[..., None]
        return found

    # ---- the step
    def write(
        self, cache: Any, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        if not isinstance(cache, View):
            super().write(cache, layer, k, v, plan)
            return
        size, slots = plan.group.block_tokens, plan.arrays.slots
        for which, x in enumerate((k, v)):
            codes, scales = self.quantised(x)
            cache.codes[slots // size, layer, which, slots % size] = codes
            self.write_scales(cache, layer, which, slots // size, slots % size, scales)

    def write_scales(
        self,
        cache: View,
        layer: int,
        which: int,
        blocks: HostArray,
        offsets: HostArray,
        scales: HostArray,
    ) -> None:
        cache.scales[blocks, layer, which, offsets] = scales

    def gather(
        self, cache: Any, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        if not isinstance(cache, View):
            return super().gather(cache, layer, row, j, plan)
        blocks, offsets = self.blocks(row, j, plan), self.offsets(j, plan)
        keys, values = (
            self.values(
                cache.codes[blocks, layer, which, offsets],
                self.scales_of(cache, layer, which, blocks, offsets, plan),
            )
            for which in (0, 1)
        )
        return keys, values

    def scales_of(
        self,
        cache: View,
        layer: int,
        which: int,
        blocks: HostArray,
        offsets: HostArray,
        plan: AttentionPlan,
    ) -> HostArray:
        """[keys, Hkv]"""
        found: HostArray = cache.scales[blocks, layer, which, offsets]
        return found


class InverseKernel(Int8Kernel):
    """Multiplies with inverses, as kernels do, and takes the scales of a tile out of its sums."""

    TILE, QUERIES = 32, 16

    def scale8(self, amax: HostArray) -> HostArray:
        return np.where(np.isfinite(amax), amax * (single(1) / MOST), single(np.nan))

    def codes8(self, x: HostArray, scales: HostArray) -> HostArray:
        amax = np.abs(x).max(-1)
        inverse = MOST / np.where((amax > 0) & np.isfinite(amax), amax, single(1))
        return np.clip(np.rint(x * inverse[..., None]), -MOST, MOST)

    def values(self, codes: HostArray, scales: HostArray) -> HostArray:
        """Codes with their scale as one more place, which `dot` and `weighed` take off again."""
        return np.concatenate((codes.astype(single), scales[..., None]), -1)

    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        if keys.shape[-1] == q.shape[-1]:
            return super().dot(q, keys)
        return super().dot(q, keys[..., :-1]) * keys[:, None, :, -1]

    def weighed(self, p: HostArray, values: HostArray) -> HostArray:
        if values.shape[-1] % 2 == 0:  # heads are even
            return super().weighed(p, values)
        return super().weighed(p * values[:, None, :, -1], values[..., :-1])


class Int8Runtime(ZooRuntime):
    ATTENTION: type[Kernel] = Int8Kernel
    CAPS = replace(ZooRuntime.CAPS, kv_dtypes=frozenset({"int8"}))


class InverseRuntime(BucketRuntime):
    ATTENTION = InverseKernel
    CAPS = replace(BucketRuntime.CAPS, kv_dtypes=frozenset({"int8"}))
