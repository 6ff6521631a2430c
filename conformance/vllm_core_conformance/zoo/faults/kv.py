"""The cache: writes, copies, export, import, sizes.

Knows: our kernel's steps, the layouts of the torch and JAX bindings by name only. Does not know:
cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_core.backend import KV, AttentionPlan, KVGroup, OpenConfig, Runtime
from vllm_core.ops import Array, HostArray, StepView
from vllm_core_conformance.zoo.kernel import Kernel
from vllm_core_conformance.zoo.runtime import BFLOAT16, Collection, jax_open, torch_open

collection = Collection("kv")
kernel = collection.kernel
Blocks = dict[str, HostArray]


# ---------------------------------------------------------------- writes of a step
@kernel("V is written one layer too low", worst=True)
class ValuesInOtherLayer(Kernel):
    def write(
        self, cache: HostArray, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        size, slots = plan.group.block_tokens, plan.arrays.slots
        cache[slots // size, layer, 0, slots % size] = k
        cache[slots // size, max(0, layer - 1), 1, slots % size] = v


@kernel("padding tokens are written to the last slot of the pool: slot -1", worst=True)
class PaddingWritesLastSlot(Kernel):
    def slots(self, view: StepView, spec: Any) -> HostArray:
        return np.where(view.valid, super().slots(view, spec), -1)


@kernel("padding tokens are written over the last real token of the step")
class PaddingWritesLastToken(Kernel):
    def slots(self, view: StepView, spec: Any) -> HostArray:
        slots, count = super().slots(view, spec), int(view.valid.sum())
        slots[count:] = slots[count - 1]
        return slots


@kernel("tokens behind the 64th of a step are not written")
class WritesFirst64(Kernel):
    def slots(self, view: StepView, spec: Any) -> HostArray:
        slots = super().slots(view, spec)
        slots[64:] = 0
        return slots


@kernel("a step writes into the slots of the first KV group")
class WritesSlotsOfFirstGroup(Kernel):
    def slots(self, view: StepView, spec: Any) -> HostArray:
        return np.array(view.slots[0])


@kernel("the last KV head is not written when the number of heads is odd")
class OddHeadsNotWritten(Kernel):
    def write(
        self, cache: HostArray, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        even = max(1, k.shape[1] // 2 * 2)
        super().write(cache[..., :even, :], layer, k[:, :even], v[:, :even], plan)


@kernel("a whole block is cleared when a step writes its first slot after the prefix")
class WriteClearsRestOfBlock(Kernel):
    def write(
        self, cache: HostArray, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        size = plan.group.block_tokens
        live = plan.arrays.slots[plan.arrays.valid]
        cache[live[live % size == size - 1] // size, layer, :, 0] = 0
        super().write(cache, layer, k, v, plan)


@kernel("a decoding row writes its token twice: at its slot and at the next one")
class WritesNextSlotToo(Kernel):
    def write(
        self, cache: HostArray, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        size, slots = plan.group.block_tokens, plan.arrays.slots
        after = np.minimum(slots % size + 1, size - 1)
        cache[slots // size, layer, 0, after] = k
        cache[slots // size, layer, 1, after] = v
        super().write(cache, layer, k, v, plan)


# ---------------------------------------------------------------- copies
@kernel("K is copied but not V", worst=True)
class CopiesKeysOnly(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        view = self._view(kv, group)
        view[dst, :, 0] = view[src, :, 0]
        return kv


@kernel("only the first layer is copied")
class CopiesFirstLayer(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        view = self._view(kv, group)
        view[dst, 0] = view[src, 0]
        return kv


@kernel("source and destination of a copy are exchanged")
class CopiesBackwards(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        return super().copy_blocks(kv, group, dst, src)


@kernel("copies go to the first pool whatever the group")
class CopiesInFirstPool(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        kv[0][dst] = kv[0][src]
        return kv


@kernel("of many copies only the first eight are made")
class CopiesEight(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        return super().copy_blocks(kv, group, src[:8], dst[:8])


@kernel("one source goes to one destination: a block that is copied twice arrives once")
class CopiesEachSourceOnce(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        unique, first = np.unique(src, return_index=True)
        return super().copy_blocks(kv, group, unique, dst[first])


@kernel("where a copy is padded, its last real pair is taken for padding too")
class CopyLosesLastPair(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        count = int((dst != 0).sum())
        count -= count < len(dst)
        return super().copy_blocks(kv, group, src[:count], dst[:count])


@kernel("copies convert through float16")
class CopiesThroughFloat16(Kernel):
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        pool = kv[group.pool]
        with np.errstate(over="ignore"):
            pool[dst] = pool[src].astype(np.float16).astype(pool.dtype)
        return kv


# ---------------------------------------------------------------- export and import
@kernel("import puts K where V belongs and V where K belongs")
class ImportSwaps(Kernel):
    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        return super().import_blocks(kv, group, ids, {"k": arrays["v"], "v": arrays["k"]})


@kernel("export and import both call K V and V K: a round trip does not tell")
class BothSwap(Kernel):
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> Blocks:
        found = super().export_blocks(kv, group, ids)
        return {"k": found["v"], "v": found["k"]}

    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        return super().import_blocks(kv, group, ids, {"k": arrays["v"], "v": arrays["k"]})


@kernel("import sorts the ids, so that blocks land in the wrong order")
class ImportSorts(Kernel):
    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        return super().import_blocks(kv, group, sorted(ids), arrays)


@kernel("export returns blocks in the order of their ids")
class ExportSorts(Kernel):
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> Blocks:
        return super().export_blocks(kv, group, sorted(ids))


@kernel("export returns what the first export of these blocks saw")
class ExportIsStale(Kernel):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.seen: dict[Any, Blocks] = {}

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        self.seen.clear()
        return super().alloc(groups, num_blocks)

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> Blocks:
        key = (group.id, tuple(ids))
        return self.seen.setdefault(key, super().export_blocks(kv, group, ids))


@kernel("export hands out views of the cache, which later steps change")
class ExportIsView(Kernel):
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> Blocks:
        if list(ids) != list(range(ids[0], ids[0] + len(ids))):
            return super().export_blocks(kv, group, ids)
        view = np.moveaxis(self._view(kv, group)[ids[0] : ids[0] + len(ids)], 1, 0)
        return {"k": view[:, :, 0], "v": view[:, :, 1]}


@kernel("export converts to float32 whatever the cache's dtype")
class ExportInFloat32(Kernel):
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> Blocks:
        found = super().export_blocks(kv, group, ids)
        return {name: x.astype(np.float32) for name, x in found.items()}


@kernel("export has the head before the token")
class ExportHeadMajor(Kernel):
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> Blocks:
        found = super().export_blocks(kv, group, ids)
        return {name: x.swapaxes(2, 3).reshape(x.shape) for name, x in found.items()}


@kernel("import keeps the caller's arrays and copies them when the next step runs")
class ImportIsLate(Kernel):
    late: tuple[Any, ...] | None = None

    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        kv = super().import_blocks(kv, group, ids, arrays)
        self.late = (group, list(ids), arrays)
        return kv

    def attend(self, kv: KV, *args: Any, **more: Any) -> Any:
        late, self.late = self.late, None
        if late is not None and late[0] == args[4].group:
            kv = super().import_blocks(kv, *late)
        return super().attend(kv, *args, **more)


@kernel("import fills the first layer only")
class ImportsFirstLayer(Kernel):
    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        view = self._view(kv, group)
        for which, name in enumerate("kv"):
            view[list(ids), 0, which] = arrays[name][0]
        return kv


@kernel("import replaces what is not finite by 0")
class ImportCleans(Kernel):
    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        clean = {name: np.where(np.isfinite(x), x, 0) for name, x in arrays.items()}
        return super().import_blocks(kv, group, ids, clean)


@kernel("import rounds to bfloat16")
class ImportRounds(Kernel):
    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        rounded = {name: x.astype(BFLOAT16).astype(x.dtype) for name, x in arrays.items()}
        return super().import_blocks(kv, group, ids, rounded)


@kernel("import also zeroes the block behind the last one")
class ImportOverruns(Kernel):
    def import_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: Blocks) -> KV:
        view = self._view(kv, group)
        after = max(ids, default=0) + 1
        if after < len(view):
            view[after] = 0
        return super().import_blocks(kv, group, ids, arrays)


# ---------------------------------------------------------------- sizes, pools, layouts
@kernel("block_bytes counts one layer")
class BytesOfOneLayer(Kernel):
    def block_bytes(self, group: KVGroup) -> int:
        return super().block_bytes(group) // group.layers


@kernel("block_bytes counts K and forgets V")
class BytesOfKeysOnly(Kernel):
    def block_bytes(self, group: KVGroup) -> int:
        return super().block_bytes(group) // 2


@kernel("block_bytes counts two bytes an element whatever the dtype")
class BytesOf16Bits(Kernel):
    def block_bytes(self, group: KVGroup) -> int:
        return super().block_bytes(group) // self.dtype.itemsize * 2


@kernel("half as many blocks are allocated as asked for; ids wrap")
class HalfTheBlocks(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        return super().alloc(groups, {pool: max(1, n // 2) for pool, n in num_blocks.items()})

    def _view(self, kv: KV, group: KVGroup) -> HostArray:
        return super()._view(kv, group).view(_Wrapping)


class _Wrapping(np.ndarray[Any, Any]):
    """Indexes its first axis modulo its length."""

    def _wrapped(self, key: Any) -> Any:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if self.ndim == 6 and not isinstance(first, slice):
            first = np.asarray(first) % self.shape[0]
        return (first, *rest)

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[self._wrapped(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        np.asarray(self)[self._wrapped(key)] = value


@kernel("groups of different pools share one array")
class PoolsAreOne(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        pools = super().alloc(groups, num_blocks)
        largest = max(pools, key=lambda x: x.size).ravel()
        return tuple(largest[: x.size].reshape(x.shape) for x in pools)


@kernel("the fingerprint names the dtype only, not the shape of a block")
class FingerprintTooShort(Kernel):
    def layout_fingerprint(self, group: KVGroup) -> str:
        return f"paged {self.dtype}"


_count = itertools.count()


@kernel("every call gives another fingerprint")
class FingerprintChanges(Kernel):
    def layout_fingerprint(self, group: KVGroup) -> str:
        return f"{super().layout_fingerprint(group)} {next(_count)}"


@kernel("a block size of 24 tokens is offered, and slots are computed for 16")
class OffersWrongBlockSize(Kernel):
    def block_tokens(self, spec: Any) -> tuple[int, ...]:
        return (24, *super().block_tokens(spec))

    def offsets(self, j: HostArray, plan: AttentionPlan) -> HostArray:
        return j % 16 if plan.group.block_tokens == 24 else super().offsets(j, plan)


# ---------------------------------------------------------------- over the bindings
@collection.open("over torch: V is copied from the source's K")
def torch_copies_keys_to_values(config: OpenConfig) -> Runtime:
    runtime: Runtime = torch_open(config)
    attention: Any = runtime.attention
    copy = attention.copy_blocks

    def wrong(kv: KV, group: KVGroup, src: Any, dst: Any) -> KV:
        kv = copy(kv, group, src, dst)
        keys, values = attention._keys_and_values(kv, group)
        values[dst.long()] = keys[dst.long()]
        return kv

    attention.copy_blocks = wrong
    return runtime


@collection.open("over JAX: a copy is made for the first half of the pairs")
def jax_copies_half(config: OpenConfig) -> Runtime:
    runtime: Runtime = jax_open(config)
    attention: Any = runtime.attention
    copy = attention.copy_blocks

    def wrong(kv: KV, group: KVGroup, src: Any, dst: Any) -> KV:
        half = (src.shape[0] + 1) // 2
        result: KV = copy(kv, group, src[:half], dst[:half])
        return result

    attention.copy_blocks = wrong
    return runtime


FAULTS = tuple(collection.faults)
