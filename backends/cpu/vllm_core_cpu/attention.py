"""Paged attention through our kernel: the cache in its layout, one call a layer.

Cache of a pool: [blocks, layers, KV heads, K then V] (csrc/cache.h), in the model dtype or in
int8 codes with scales. A plan is the kernel's record with the addresses of the step's tables and
lengths: a layer fills in its own tensors only.

Knows: the kernel's record, torch tensors. Does not know: models, who owns a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_core.backend import (
    INT8_KV,
    KV,
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HostStep,
    KVGroup,
)
from vllm_core.bindings.torch.convert import dtype_of, from_host, to_host
from vllm_core.errors import InvalidArgument, NotSupported, OutOfMemory
from vllm_core.ops import BucketKey, DeviceState, HostArray, StepInput, StepView
from vllm_core_cpu import native
from vllm_core_cpu.memory import Empty, zeros
from vllm_core_cpu.weights import DTYPES

Tensor = torch.Tensor

BLOCK_TOKENS = (32, 64, 16, 128, 256)
"""K stands in groups of 16 tokens."""
KV_DTYPES = frozenset({"int8"})
"""Beside the model dtype."""


@dataclass(frozen=True, eq=False)
class PlanArrays:
    """The records of one spec, and the tensors whose addresses they hold."""

    step: native.AttendStep
    record: native.Attend
    address: int
    held: tuple[Tensor, ...]


class CpuAttention(AttentionBackend):
    """One runtime's, in float32 or bfloat16."""

    def __init__(
        self, kernels: native.Native, empty: Empty, dtype: str, synchronize: Callable[[], None]
    ) -> None:
        """empty: where outputs get their memory; synchronize: waits until what was submitted has
        run."""
        self.kernels = kernels
        self.empty = empty
        self.dtype = dtype_of(dtype)
        self._code = DTYPES[self.dtype]
        self._dtype_name = dtype
        self._synchronize = synchronize

    # ---- the cache
    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return BLOCK_TOKENS

    def block_bytes(self, group: KVGroup) -> int:
        return self._block_elements(group) * self._kv_dtype(group).itemsize

    def _kv_dtype(self, group: KVGroup) -> torch.dtype:
        """Of the cache. NotSupported for a format that our kernels do not have."""
        group.spec.kv.refuse_unless(self._dtype_name, KV_DTYPES)
        return torch.int8 if group.spec.kv == INT8_KV else self.dtype

    def _codes(self, group: KVGroup) -> tuple[int, int]:
        """What is computed in and what is stored, as kernels.h names them."""
        is_int8 = self._kv_dtype(group) == torch.int8
        return self._code, native.INT8 if is_int8 else self._code

    def _block_elements(self, group: KVGroup) -> int:
        spec = group.spec
        head: int = self.kernels.kv_head_size(
            *self._codes(group), spec.dim_qk, spec.dim_v, group.block_tokens
        )
        return group.layers * spec.num_kv_heads * head

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        formats = {g.pool: (self._block_elements(g), self._kv_dtype(g)) for g in groups}
        for group in groups:
            if group.block_tokens % 16:
                raise NotSupported(
                    f"blocks of {group.block_tokens} tokens: this layout needs multiples of 16"
                )
            if (self._block_elements(group), self._kv_dtype(group)) != formats[group.pool]:
                raise InvalidArgument("groups of one pool must have blocks of one size and dtype")
        try:
            return tuple(
                zeros(num_blocks[pool] * size * dtype.itemsize)
                .view(dtype)
                .view(num_blocks[pool], size)
                for pool, (size, dtype) in sorted(formats.items())
            )
        except (OSError, RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"no memory for {num_blocks} KV blocks (by pool); lower num_kv_blocks or "
                "memory_utilization"
            ) from error

    def layout_fingerprint(self, group: KVGroup) -> str:
        spec = group.spec
        shape = (group.layers, spec.num_kv_heads, group.block_tokens, spec.dim_qk, spec.dim_v)
        stored = " of int8 and scales" if self._kv_dtype(group) == torch.int8 else ""
        return f"cpu-lanes-of-16 (layers, heads, tokens, dim, dim_v) {shape} {self.dtype}{stored}"

    def _record(self, kv: KV, group: KVGroup, layer: int) -> native.Attend:
        spec = group.spec
        dtype, kv_dtype = self._codes(group)
        return native.Attend(
            cache=kv[group.pool].data_ptr(),
            block_stride=self._block_elements(group),
            layer=layer,
            q_heads=spec.num_q_heads,
            kv_heads=spec.num_kv_heads,
            dim=spec.dim_qk,
            dim_v=spec.dim_v,
            block_tokens=group.block_tokens,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )

    def _shapes(self, group: KVGroup, count: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of the arrays that `count` blocks are exported as."""
        spec, dtype = group.spec, self._kv_dtype(group)
        lead = (group.layers, count, group.block_tokens, spec.num_kv_heads)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "k": ((*lead, spec.dim_qk), dtype),
            "v": ((*lead, spec.dim_v), dtype),
        }
        if dtype == torch.int8:
            shapes["k_scale"] = shapes["v_scale"] = (lead, torch.float32)
        return shapes

    def _move(
        self,
        kv: KV,
        group: KVGroup,
        ids: Sequence[int],
        arrays: dict[str, Tensor],
        to_cache: bool,
    ) -> None:
        self._synchronize()
        wanted = torch.tensor(list(ids), dtype=torch.int32)
        for layer in range(group.layers):
            record = self._record(kv, group, layer)
            addresses = {name: x[layer].data_ptr() for name, x in arrays.items()}
            blocks = native.Blocks(
                ids=wanted.data_ptr(), count=len(wanted), to_cache=to_cache, **addresses
            )
            self.kernels.move_blocks(addressof(record), addressof(blocks))

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        shapes = self._shapes(group, len(ids))
        arrays = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        self._move(kv, group, ids, arrays, False)
        return {name: to_host(x) for name, x in arrays.items()}

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        """Numbers may be of another float dtype; codes and scales must be as they were exported.
        InvalidArgument for anything else."""
        shapes = self._shapes(group, len(ids))
        if arrays.keys() != shapes.keys():
            raise _no_export(f"{', '.join(shapes)}, not {', '.join(arrays) or 'nothing'}")
        is_coded = self._kv_dtype(group) == torch.int8
        given = {}
        for name, (shape, dtype) in shapes.items():
            x = from_host(arrays[name])
            fits = x.dtype == dtype if is_coded else x.dtype.is_floating_point
            if tuple(x.shape) != shape or not fits:
                wanted = str(dtype).removeprefix("torch.")
                raise _no_export(
                    f"{name} must be {wanted} {list(shape)}, not {arrays[name].dtype} "
                    f"{list(x.shape)}"
                )
            given[name] = x.to(dtype).contiguous()
        self._move(kv, group, ids, given, True)
        return kv

    def copy_blocks(self, kv: KV, group: KVGroup, src: Tensor, dst: Tensor) -> KV:
        pool = kv[group.pool]
        pool[dst] = pool[src]
        return kv

    # ---- once per step
    def plan_host(self, host: HostStep, key: BucketKey) -> dict[str, HostArray]:
        return {"num_rows": np.array([len(host.query_len)], np.int64)}

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
        lengths, start, rows = (
            x.to(torch.int32).contiguous() for x in (view.seq_lens, step.query_start, step.row)
        )
        plans = []
        for spec in specs:
            if spec.chunk is not None or spec.alibi or not spec.writes_kv:
                raise NotSupported("chunked, ALiBi and borrowed attention are reserved")
            group = groups[spec.group]
            dtype, kv_dtype = self._codes(group)
            tables = state.tables[spec.group].contiguous()
            shared = native.AttendStep(
                tables=tables.data_ptr(),
                rows=rows.data_ptr(),
                seq_lens=lengths.data_ptr(),
                query_start=start.data_ptr(),
                table_stride=tables.shape[1],
                num_rows=int(host_part["num_rows"][0]),
                num_tokens=len(view.token_ids),
            )
            record = native.Attend(
                step=addressof(shared),
                block_stride=self._block_elements(group),
                q_heads=spec.num_q_heads,
                kv_heads=spec.num_kv_heads,
                dim=spec.dim_qk,
                dim_v=spec.dim_v,
                block_tokens=group.block_tokens,
                window=-1 if spec.window is None else spec.window,
                scale=spec.scale,
                softcap=spec.softcap or 0.0,
                causal=int(spec.causal),
                dtype=dtype,
                kv_dtype=kv_dtype,
            )
            arrays = PlanArrays(shared, record, addressof(record), (tables, rows, lengths, start))
            plans.append(AttentionPlan(arrays, spec, group))
        return tuple(plans)

    # ---- per layer
    def attend(
        self,
        kv: KV,
        layer: Tensor | int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        *,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, KV]:
        if return_lse and sinks is not None:
            raise InvalidArgument("return_lse with sinks: merge applies the sink, once")
        spec, record = plan.spec, plan.arrays.record
        q, k, v = (_dense_heads(x, self.dtype) for x in (q, k, v))
        out = self.empty((len(q), spec.num_q_heads, spec.dim_v), self.dtype)
        lse = None
        if return_lse:
            lse = self.empty((len(q), spec.num_q_heads), torch.float32)
        if sinks is not None:
            sinks = sinks.float().contiguous()
        record.cache, record.layer = kv[plan.group.pool].data_ptr(), int(layer)
        record.q, record.k, record.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        record.q_stride, record.k_stride, record.v_stride = q.stride(0), k.stride(0), v.stride(0)
        record.out, record.lse = out.data_ptr(), None if lse is None else lse.data_ptr()
        record.sinks = None if sinks is None else sinks.data_ptr()
        self.kernels.attend(plan.arrays.address)
        return out, lse, kv


def _no_export(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{why}: these arrays are no blocks of this cache; export them from a cache of the same "
        "layout_fingerprint"
    )


def _dense_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, heads, D] with heads side by side; tokens may be further apart."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
        x = x.contiguous()
    return x
