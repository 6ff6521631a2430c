"""Attention and caches that are right until two features meet, or a count leaves the usual: windows
of whole blocks, sinks beside a softcap, layers planned together, many heads, many blocks.

Knows: our kernel's steps. Does not know: cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.backend import KV, AttentionPlan, AttentionSpec, KVGroup
from vllm_core.ops import Array, HostArray
from vllm_core_conformance.zoo.kernel import Kernel, Row, Sums
from vllm_core_conformance.zoo.runtime import Collection

collection = Collection("attention")
kernel = collection.kernel

TILE = 64


# ---------------------------------------------------------------- windows
@kernel("a window that is a multiple of the block size is one token too short")
class WindowOfWholeBlocks(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        seen, window = super().visible(row, j, spec), spec.window
        if window is not None and window > 1 and window % row.block_tokens == 0:
            seen = seen & (j > self.positions(row)[:, None] - window + 1)
        return seen


@kernel("without a causal mask a window cuts what comes later as well")
class WindowOnBothSides(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        seen = super().visible(row, j, spec)
        if spec.window is not None and not spec.causal:
            seen = seen & (j < self.positions(row)[:, None] + spec.window)
        return seen


@kernel("where a window begins to read is decided by the step's first row")
class FirstRowBeginsTheWindow(Kernel):
    begin = 0

    def attend(self, kv: KV, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        arrays, window = plan.arrays, plan.spec.window
        length = int(arrays.seq_lens[0])
        own = int(arrays.query_start[1] - arrays.query_start[0])
        self.begin = 0 if window is None else max(0, length - own - window + 1) // TILE * TILE
        return super().attend(kv, layer, q, k, v, plan, **more)

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, spec) & (j >= self.begin)


@kernel("a part of the keys that a window hides wholly joins the merge with a sum of one")
class HiddenPartCounts(Kernel):
    def softmax(
        self,
        q: HostArray,
        keys: HostArray,
        values: HostArray,
        row: Row,
        j: HostArray,
        spec: AttentionSpec,
    ) -> Sums:
        sums = super().softmax(q, keys, values, row, j, spec)
        if spec.window is not None and self.positions(row)[0] - spec.window >= TILE - 1:
            sums = self.with_sink(sums, np.zeros((spec.num_q_heads, 1), sums.total.dtype))
        return sums


# ---------------------------------------------------------------- layers side by side
@kernel("the softcap bends the sinks too")
class SinkIsCapped(Kernel):
    def attend(self, kv: KV, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        softcap, sinks = plan.spec.softcap, more.get("sinks")
        if softcap is not None and sinks is not None:
            more["sinks"] = (softcap * np.tanh(sinks / softcap)).astype(sinks.dtype)
        return super().attend(kv, layer, q, k, v, plan, **more)


@kernel("layers of one KV group and window share the scale and softcap of the first of them")
class OnePlanForTheGroup(Kernel):
    def plan(self, *args: Any) -> tuple[AttentionPlan, ...]:
        first: dict[tuple[int, int | None], AttentionSpec] = {}
        found = []
        for plan in super().plan(*args):
            own = first.setdefault((plan.spec.group, plan.spec.window), plan.spec)
            spec = replace(plan.spec, scale=own.scale, softcap=own.softcap)
            found.append(replace(plan, spec=spec))
        return tuple(found)


# ---------------------------------------------------------------- counts
@kernel("block ids are held in 15 bits")
class BlockIdsOf15Bits(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        return super().blocks(row, j, plan) & 0x7FFF


@kernel("there are seven KV heads at most: later ones read the seventh")
class SevenHeads(Kernel):
    def kv_heads(self, spec: AttentionSpec) -> HostArray:
        return np.minimum(super().kv_heads(spec), 6)


@kernel("a chunk's queries are counted in 8 bits")
class QueriesOf8Bits(Kernel):
    def positions(self, row: Row) -> HostArray:
        return row.cached + np.arange(row.begin - row.first, row.end - row.first) % 256


@kernel("the values of heads wider than 128 end there, but for windows and softcaps")
class WideHeadsCutShort(Kernel):
    def attend(self, kv: KV, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        out, lse, kv = super().attend(kv, layer, q, k, v, plan, **more)
        if plan.spec.window is None and plan.spec.softcap is None:
            out[..., 128:] = 0
        return out, lse, kv


@kernel("of an odd number of copies the last is lost")
class OddCopyLost(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        even = len(src) // 2 * 2
        return super().copy_blocks(kv, group, src[:even], dst[:even])


@kernel("every pool gets the number of blocks of the first")
class PoolsOfOneSize(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        return super().alloc(groups, dict.fromkeys(num_blocks, num_blocks[groups[0].pool]))


FAULTS = tuple(collection.faults)
