"""Paged attention over a cache of our own layout, by the kernels of attention.cl.

Cache of a pool: [num_blocks, layers, 2, Hkv, BT, D] float32 in one OpenCL buffer.

Knows: the layout, the kernels' arguments. Does not know: who owns a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyopencl as cl

from vllm_core.backend import (
    KV,
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    KVGroup,
)
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import Array, BucketKey, DeviceState, HostArray, StepInput, StepView
from vllm_core_opencl.device import Device

GROUP = 64
MAX_DIM = 256


class OpenCLAttention(AttentionBackend):
    """float32 throughout. The queue is in order, so nothing needs to wait but a read."""

    def __init__(self, device: Device) -> None:
        self.device = device

    # ---- the cache
    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (16, 32, 8, 64)

    def _shape(self, group: KVGroup) -> tuple[int, ...]:
        spec = group.spec
        return (group.layers, 2, spec.num_kv_heads, group.block_tokens, spec.dim_qk)

    def block_bytes(self, group: KVGroup) -> int:
        return math.prod(self._shape(group)) * 4

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        pools: dict[int, Any] = {}
        for group in groups:
            spec = group.spec
            if spec.dim_v != spec.dim_qk or spec.dim_qk > MAX_DIM:
                raise NotSupported(
                    f"heads of {spec.dim_qk} (K) and {spec.dim_v} (V): this backend needs both "
                    f"equal and at most {MAX_DIM}"
                )
            spec.kv.refuse_unless("float32")
            if group.pool not in pools:
                size = num_blocks[group.pool] * self.block_bytes(group)
                pools[group.pool] = self.device.alloc(size, f"{num_blocks[group.pool]} KV blocks")
        return pools

    def layout_fingerprint(self, group: KVGroup) -> str:
        return f"opencl block-layer-kv-head-token-dim {self._shape(group)} float32"

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        size = self.block_bytes(group)
        blocks = np.empty((len(ids), *self._shape(group)), np.float32)
        for place, block in enumerate(ids):
            self.device.read(blocks[place], kv[group.pool], int(block) * size)
        # [id, layer, 2, head, token, dim] -> [2, layer, id, token, head, dim]
        canonical = blocks.transpose(2, 1, 0, 4, 3, 5)
        return {"k": canonical[0].copy(), "v": canonical[1].copy()}

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        size = self.block_bytes(group)
        canonical = np.stack((arrays["k"], arrays["v"])).astype(np.float32, copy=False)
        blocks = np.ascontiguousarray(canonical.transpose(2, 1, 0, 4, 3, 5))
        for place, block in enumerate(ids):
            self.device.write(kv[group.pool], blocks[place], int(block) * size)
        return kv

    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        size = self.block_bytes(group)
        for a, b in zip(np.asarray(src).tolist(), np.asarray(dst).tolist(), strict=True):
            if a != b:
                self.device.copy(kv[group.pool], a * size, b * size, size)
        return kv

    # ---- the step
    def plan(
        self,
        state: DeviceState,
        view: StepView,
        step: StepInput,
        key: BucketKey,
        host_part: Any,
        specs: tuple[AttentionSpec, ...],
        groups: tuple[KVGroup, ...],
    ) -> tuple[AttentionPlan, ...]:
        """Per spec: slots, tables of the step's rows, row and visible range of each token."""

        def plan_of(spec: AttentionSpec) -> AttentionPlan:
            length = view.seq_lens[view.sequence]
            end = np.minimum(view.positions + 1, length) if spec.causal else length
            first = np.zeros_like(end)
            if spec.window is not None:
                first = np.maximum(0, view.positions - spec.window + 1)
            visible = np.stack((first, np.where(view.valid, end, first)), 1).astype(np.int32)
            tables = state.tables[spec.group][step.row]
            arrays = tuple(
                self.device.put(x.astype(np.int32))
                for x in (view.slots[spec.group], tables, view.sequence, visible)
            )
            return AttentionPlan(arrays, spec, groups[spec.group], tables.shape[1])

        return tuple(plan_of(spec) for spec in specs)

    def attend(
        self,
        kv: KV,
        layer: Array | int,
        q: Array,
        k: Array,
        v: Array,
        plan: AttentionPlan,
        *,
        sinks: Array | None = None,
        return_lse: bool = False,
    ) -> tuple[Array, Array | None, KV]:
        if return_lse and sinks is not None:
            raise InvalidArgument("return_lse with sinks: merge applies the sink, once")
        device, spec, group = self.device, plan.spec, plan.group
        cache = kv[group.pool]
        slots, tables, rows, visible = plan.arrays
        num_tokens, heads, dim = q.shape
        out = np.zeros((num_tokens, heads, dim), np.float32)
        lse = np.full((num_tokens, heads), -np.inf, np.float32)
        if num_tokens == 0:
            return out, lse if return_lse else None, kv
        sizes = [np.int32(x) for x in (layer, group.layers)]
        block = [np.int32(x) for x in (spec.num_kv_heads, group.block_tokens, dim)]
        device.write_kv(
            device.queue,
            (dim, spec.num_kv_heads, num_tokens),
            None,
            *(cache, device.put(k), device.put(v), slots, *sizes, *block),
        )
        flags = cl.mem_flags.WRITE_ONLY
        out_buffer = cl.Buffer(device.context, flags, out.nbytes)
        lse_buffer = cl.Buffer(device.context, flags, lse.nbytes)
        sink_buffer = device.put(np.zeros(heads, np.float32) if sinks is None else sinks)
        device.attend(
            device.queue,
            (heads * GROUP, num_tokens),
            (GROUP, 1),
            *(out_buffer, lse_buffer, cache, device.put(q), tables, rows, visible, sink_buffer),
            *(*sizes, np.int32(heads), *block, np.int32(plan.static)),
            *(np.float32(spec.scale), np.float32(spec.softcap or 0), np.int32(sinks is not None)),
        )
        device.read(out, out_buffer)
        device.read(lse, lse_buffer)
        return out, lse if return_lse else None, kv
