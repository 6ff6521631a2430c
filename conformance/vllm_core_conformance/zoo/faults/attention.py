"""Attention that reads the wrong keys: tables, slots, masks, heads, layers, rows, tiles.

Knows: our kernel's steps. Does not know: cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.backend import AttentionPlan, AttentionSpec
from vllm_core.ops import Array, BucketKey, DeviceState, HostArray, StepInput
from vllm_core_conformance.zoo.kernel import Kernel, Row, Sums
from vllm_core_conformance.zoo.runtime import Collection

collection = Collection("attention")
kernel = collection.kernel


# ---------------------------------------------------------------- tables and slots
@kernel("the last key of a block is looked up in the next block", worst=True)
class BlockRoundsUp(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        size, tables = plan.group.block_tokens, plan.arrays.tables
        column = np.minimum((j + 1) // size, tables.shape[1] - 1)
        return np.asarray(tables[row.index, np.where(j + 1 < row.length, column, j // size)])


@kernel("slots are counted modulo 16 whatever the size of a block")
class SlotModulo16(Kernel):
    def offsets(self, j: HostArray, plan: AttentionPlan) -> HostArray:
        return np.asarray(np.minimum(j % 16, plan.group.block_tokens - 1))


@kernel("block ids are taken to be consecutive from the first one on", worst=True)
class ConsecutiveBlocks(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        first = plan.arrays.tables[row.index, 0] + j // plan.group.block_tokens
        return np.asarray(first % (plan.arrays.tables.max() + 1))


@kernel("the table is read with the width that the first step had")
class FirstTableStride(Kernel):
    stride = 0

    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        tables = plan.arrays.tables
        self.stride = self.stride or tables.shape[1]
        flat = row.index * self.stride + j // plan.group.block_tokens
        return np.asarray(tables.ravel()[np.minimum(flat, tables.size - 1)])


@kernel("tables are taken in the order of the state's rows, not of the step's", worst=True)
class TablesInStateOrder(Kernel):
    def tables(
        self, state: DeviceState, step: StepInput, key: BucketKey, spec: AttentionSpec
    ) -> HostArray:
        table = state.tables[spec.group][:-1, : key.widths[spec.group]]
        return np.resize(table, (len(step.row), table.shape[1]))


@kernel("tables of the first KV group serve every group")
class TablesOfFirstGroup(Kernel):
    def tables(
        self, state: DeviceState, step: StepInput, key: BucketKey, spec: AttentionSpec
    ) -> HostArray:
        return super().tables(state, step, key, replace(spec, group=0))


@kernel("the partly filled last block is replaced by the one before")
class PartialBlockLost(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        size = plan.group.block_tokens
        column = np.minimum(j // size, max(row.length // size - 1, 0))
        return np.asarray(plan.arrays.tables[row.index, column])


@kernel("cached tokens behind the last whole block are left out of a prefill behind a prefix")
class CachedPartialBlockLost(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        whole = row.cached // row.block_tokens * row.block_tokens
        lost = (row.num_queries > 1) & (j >= whole) & (j < row.cached)
        return super().visible(row, j, spec) & ~lost


@kernel("the block with the highest id of the pool cannot be read: the id before it is")
class LastBlockId(Kernel):
    def gather(
        self, cache: HostArray, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        blocks = np.minimum(self.blocks(row, j, plan), len(cache) - 2)
        offsets = self.offsets(j, plan)
        return cache[blocks, layer, 0, offsets], cache[blocks, layer, 1, offsets]


@kernel("a block is taken to have one owner: only the last row that names it reads it")
class SharedBlockHasOneOwner(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        found, size = super().blocks(row, j, plan), plan.group.block_tokens
        for other in range(row.index + 1, len(plan.arrays.tables)):
            live = plan.arrays.tables[other, : -(-int(plan.arrays.seq_lens[other]) // size)]
            found = np.where(np.isin(found, live), 0, found)
        return found


@kernel("block ids are held in 8 bits")
class BlockIdsOf8Bits(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        return super().blocks(row, j, plan) & 0xFF


@kernel("the address of a slot wraps at 2^15 slots, as a short integer does")
class SlotWraps(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        return super().blocks(row, j, plan) % max(1, (1 << 15) // plan.group.block_tokens)


@kernel("the table beyond the 64th column is not read")
class TableCutAt64(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        return np.asarray(
            plan.arrays.tables[row.index, np.minimum(j // plan.group.block_tokens, 63)]
        )


# ---------------------------------------------------------------- lengths
@kernel("a decoding row does not see its own token", worst=True)
class OwnTokenDropped(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, spec) & ((j < row.length - 1) | (row.num_queries > 1))


@kernel("one slot past the end is attended", worst=True)
class OnePastTheEnd(Kernel):
    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        j = super().keys_of(row, spec)
        return np.append(j, row.length) if row.num_queries == 1 else j

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return np.asarray(super().visible(row, j, spec) | (j == row.length))

    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        return super().blocks(row, _within_table(j, plan), plan)


@kernel("decoding rows attend the whole last block", worst=True)
class WholeLastBlock(Kernel):
    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        j = super().keys_of(row, spec)
        whole = -(-row.length // row.block_tokens) * row.block_tokens
        return np.arange(j[0], whole) if row.num_queries == 1 else j

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, spec) | (j >= row.length)


@kernel("masked values are multiplied by 0 instead of being left out", worst=True)
class ZeroTimesStale(Kernel):
    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        first = super().keys_of(row, spec)[0]
        return np.arange(first, -(-row.length // row.block_tokens) * row.block_tokens)


@kernel("keys before the window are read and multiplied by 0")
class WindowReadsDeadBlocks(Kernel):
    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        return np.arange(row.length)


@kernel("a sequence of one token gives 0")
class FirstTokenGivesZero(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, spec) & (row.length > 1)


# ---------------------------------------------------------------- masks
@kernel("causal masks are aligned top-left behind a cached prefix", worst=True)
class CausalTopLeft(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        if row.num_queries == 1:
            return super().visible(row, j, spec)
        return super().visible(replace(row, length=row.num_queries), j, spec)


@kernel("a query of a prefill does not see its own position")
class CausalStrict(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        own = j == self.positions(row)[:, None]
        return np.asarray(
            super().visible(row, j, spec) & ~(own & (row.num_queries > 1) & spec.causal)
        )


@kernel("a query of a prefill sees the position after its own", worst=True)
class CausalPlusOne(Kernel):
    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        j = super().keys_of(row, spec)
        return np.arange(j[0], min(row.length, j[-1] + 2))

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        t = self.positions(row)[:, None]
        return np.asarray(super().visible(row, j, spec) | ((j == t + 1) & (j < row.length)))


@kernel("chunks of a prefill behind a cached prefix have no causal mask")
class NoMaskBehindPrefix(Kernel):
    QUERIES = 1 << 30

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, replace(spec, causal=spec.causal and row.cached == 0))


@kernel("the causal mask of a packed group shifts by the group's size rounded to a power of two")
class PackedGroupShift(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        seen, G = super().visible(row, j, spec), spec.queries_per_kv
        if row.num_queries == 1 or not spec.causal:
            return seen
        shift = G.bit_length() - 1
        t = row.cached + ((np.arange(row.begin - row.first, row.end - row.first) * G) >> shift)
        return np.broadcast_to(j < row.length, seen.shape) & (j <= t[:, None])


@kernel("causal is assumed where the layer is not")
class AlwaysCausal(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, replace(spec, causal=True))


@kernel("the window does not count the token itself", worst=True)
class WindowPlusOne(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, _windowed(spec, +1))

    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        return super().keys_of(row, _windowed(spec, +1))


@kernel("the window is one token too short")
class WindowMinusOne(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, _windowed(spec, -1))


@kernel("the window is rounded up to whole blocks")
class WindowRoundedToBlock(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, _windowed(spec, -(spec.window or 0) % row.block_tokens))

    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        return super().keys_of(row, _windowed(spec, -(spec.window or 0) % row.block_tokens))


@kernel("decoding rows ignore the window", worst=True)
class WindowIgnoredInDecode(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, self._spec(row, spec))

    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        return super().keys_of(row, self._spec(row, spec))

    def _spec(self, row: Row, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, window=None) if row.num_queries == 1 else spec


@kernel("the window is ignored")
class WindowIgnored(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, replace(spec, window=None))

    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        return super().keys_of(row, replace(spec, window=None))


@kernel("every query of a chunk has the window of its first")
class WindowOfFirstQuery(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        seen = super().visible(row, j, replace(spec, window=None))
        return seen & (j > row.cached - (spec.window or 1 << 30))

    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        return super().keys_of(replace(row, begin=row.first), spec)


@kernel("the window is that of the first kind of layer that was planned")
class WindowOfFirstSpec(Kernel):
    def plan(self, *args: Any) -> tuple[AttentionPlan, ...]:
        plans = super().plan(*args)
        return tuple(replace(p, spec=replace(p.spec, window=plans[0].spec.window)) for p in plans)


@kernel("in a mixed step the prefills get the mask of decoding rows: none")
class MixedStepLosesMask(Kernel):
    QUERIES = 1 << 30
    is_mixed = False

    def rows(self, plan: AttentionPlan) -> Iterator[Row]:
        self.is_mixed = 0 < plan.arrays.split[0] < plan.arrays.split[2]
        return super().rows(plan)

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, replace(spec, causal=spec.causal and not self.is_mixed))


# ---------------------------------------------------------------- heads, layers, rows
@kernel("query heads go round the KV heads: h % Hkv", worst=True)
class HeadsInterleaved(Kernel):
    def kv_heads(self, spec: AttentionSpec) -> HostArray:
        return np.arange(spec.num_q_heads) % spec.num_kv_heads


@kernel("the group's size is rounded down to a power of two", worst=True)
class GroupPowerOfTwo(Kernel):
    def kv_heads(self, spec: AttentionSpec) -> HostArray:
        size = 1 << (spec.queries_per_kv.bit_length() - 1)
        return np.minimum(np.arange(spec.num_q_heads) // size, spec.num_kv_heads - 1)


@kernel("of a group only the first eight query heads are computed")
class GroupOfEightAtMost(Kernel):
    group = 1

    def kv_heads(self, spec: AttentionSpec) -> HostArray:
        self.group = spec.queries_per_kv
        return super().kv_heads(spec)

    def divided(self, sums: Sums) -> HostArray:
        out = super().divided(sums)
        out[np.arange(len(out)) % self.group >= 8] = 0
        return out


@kernel("layers behind the first read the cache of the first", worst=True)
class ReadsLayerZero(Kernel):
    def gather(
        self, cache: HostArray, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        return super().gather(cache, 0, row, j, plan)


@kernel("K and V change places for heads that are no multiple of 64 wide")
class SwappedForOddDims(Kernel):
    def gather(
        self, cache: HostArray, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        keys, values = super().gather(cache, layer, row, j, plan)
        return (values, keys) if plan.spec.dim_qk % 64 else (keys, values)


@kernel("the dot product leaves out the last dims of heads that are no multiple of 32 wide")
class DimsOf32Only(Kernel):
    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        whole = max(32, q.shape[-1] // 32 * 32)
        return super().dot(q[..., :whole], keys[..., :whole])


@kernel("values behind the last whole 64 dims are not written")
class ValuesOf64Dims(Kernel):
    def divided(self, sums: Sums) -> HostArray:
        out = super().divided(sums)
        if out.shape[-1] > 64:
            out[..., out.shape[-1] // 64 * 64 :] = 0
        return out


@kernel("rows behind the 16th of a step use the table of the row 16 before")
class RowsWrapAt16(Kernel):
    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        return super().blocks(replace(row, index=row.index % 16), j, plan)


@kernel("rows behind the 64th of a step are not computed")
class RowsEndAt64(Kernel):
    def rows(self, plan: AttentionPlan) -> Iterator[Row]:
        return (row for row in super().rows(plan) if row.index < 64)


@kernel("the second tile of 64 queries starts again at the first position")
class SecondQueryTile(Kernel):
    def positions(self, row: Row) -> HostArray:
        return super().positions(row) - (row.begin - row.first) // 64 * 64


@kernel("keys behind the first tile of 128 are counted from 0 by the mask")
class MaskRestartsAt128(Kernel):
    TILE = 128

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, np.where(j >= 128, j - 128, j), spec)


@kernel("key 256 is read by two tiles")
class Key256Twice(Kernel):
    TILE = 0

    def tiles(self, split: range) -> list[slice]:
        found = super().tiles(split)
        return [*found, slice(256, 257)] if len(split) > 256 else found


@kernel("of more than 512 keys the 513th is left out, between two parts")
class Key512Lost(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return np.asarray(super().visible(row, j, spec) & (j != 512))


@kernel("keys behind the 1024th are never read")
class KeysEndAt1024(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, spec) & (j < 1024)


@kernel("keys behind the 4096th are never read")
class KeysEndAt4096(Kernel):
    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        return super().visible(row, j, spec) & (j < 4096)


@kernel("output rows of padding tokens hold whatever the buffer held", worst=True)
class PaddingKeepsGarbage(Kernel):
    def attend(self, kv: Any, layer: Array | int, q: Array, *args: Any, **more: Any) -> Any:
        out, lse, kv = super().attend(kv, layer, q, *args, **more)
        used = args[2].arrays.query_start[-1]
        out[used:] = 0.125
        return out, lse, kv


@kernel("a strided view of q is read as if it were contiguous")
class StridedQueries(Kernel):
    def attend(self, kv: Any, layer: Array | int, q: Array, *args: Any, **more: Any) -> Any:
        if not q.flags.c_contiguous and q.base is not None and q.base.flags.c_contiguous:
            q = np.resize(q.base, q.shape)
        return super().attend(kv, layer, q, *args, **more)


def _within_table(j: HostArray, plan: AttentionPlan) -> HostArray:
    return np.asarray(np.minimum(j, plan.arrays.tables.shape[1] * plan.group.block_tokens - 1))


def _windowed(spec: AttentionSpec, more: int) -> AttentionSpec:
    return spec if spec.window is None else replace(spec, window=max(1, spec.window + more))


FAULTS = tuple(collection.faults)
