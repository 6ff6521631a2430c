"""Paged attention on a TPU: the Pallas kernel where it can, the binding's own text for the rest.

Which of the two a kind of layer gets follows from facts of the layer alone (`why_not`), when the
cache is made. The plan holds the kernel's scalars and where tokens stand in its tiles.

Knows: the kernel's layout, plans. Does not know: models, who owns a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vllm_core.backend import KV, AttentionPlan, AttentionSpec, KVGroup
from vllm_core.bindings.jax.attention import JaxAttention, check
from vllm_core.errors import InvalidArgument
from vllm_core.ops import Array, BucketKey, DeviceState, HostArray, StepInput, StepView
from vllm_core_tpu import kernel
from vllm_core_tpu.kernel import LANES, TILE

MAX_UNIT_ROWS = 128
"""(query, head) pairs of a KV head in one unit, about."""
BUFFER_BYTES = 1 << 20
"""Of K and V that are met at a time, about."""
BLOCK_TOKENS = (32, 64, 16, 128, 256)
DTYPES = ("bfloat16", "float32")


class Place(NamedTuple):
    """Where the step's tokens stand for the kernel."""

    work: kernel.Work
    token: Array  # [I, Q] token of each query of a unit
    place: Array  # [T] where each token stands in [I * Q]; -1: padding
    new: Array  # [W, TILE] token of each slot of a tile that is written


@dataclass(frozen=True)
class Static:
    """Static facts of a plan for the kernel."""

    shape: kernel.Shape
    width: int


def why_not(spec: AttentionSpec) -> str | None:
    """What of the layer the kernel declines; None: nothing."""
    if spec.kv.dtype not in DTYPES:
        return f"a cache of {spec.kv.dtype}"
    if spec.dim_qk != spec.dim_v:
        return "V heads of another width than K heads"
    if spec.dim_qk > 2 * LANES:
        return f"heads of {spec.dim_qk}"
    return None


class TpuAttention(JaxAttention):
    """interpret: what pallas_call takes; True where there is no TPU."""

    def __init__(self, device: jax.Device, interpret: Any, dtype: str | None = None) -> None:
        super().__init__(device, dtype)
        self._interpret = interpret

    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return BLOCK_TOKENS if why_not(spec) is None else super().block_tokens(spec)

    # ---- the cache
    def block_shape(self, group: KVGroup) -> tuple[int, ...]:
        if not _is_ours(group):
            return super().block_shape(group)
        planes, lanes = kernel.planes(group.spec.num_kv_heads, group.spec.dim_qk)
        return (group.layers, planes, group.block_tokens, lanes)

    def storage(self, group: KVGroup) -> np.dtype[Any]:
        return jnp.dtype(group.spec.kv.dtype) if _is_ours(group) else super().storage(group)

    def layout_fingerprint(self, group: KVGroup) -> str:
        if not _is_ours(group):
            return super().layout_fingerprint(group)
        return f"tpu block-layer-plane-token-lane {self.block_shape(group)} {group.spec.kv.dtype}"

    def pack(self, group: KVGroup, arrays: dict[str, HostArray]) -> HostArray:
        """{k, v} [L, n, BT, Hkv, D] -> [n, L, planes, BT, lanes]."""
        if not _is_ours(group):
            return super().pack(group, arrays)
        both = _in_planes(np, arrays["k"], arrays["v"])  # [L, n, BT, planes, lanes]
        return np.ascontiguousarray(np.transpose(both, (1, 0, 3, 2, 4)))

    def unpack(self, group: KVGroup, blocks: HostArray) -> dict[str, HostArray]:
        if not _is_ours(group):
            return super().unpack(group, blocks)
        x = np.transpose(blocks, (1, 0, 3, 2, 4))
        dim = group.spec.dim_qk
        if kernel.is_packed(dim):
            return {"k": x[..., :dim].copy(), "v": x[..., dim : 2 * dim].copy()}
        return {"k": x[..., 0::2, :dim].copy(), "v": x[..., 1::2, :dim].copy()}

    # ---- once per step
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
        def plan_of(spec: AttentionSpec) -> AttentionPlan:
            group = groups[spec.group]
            if not _is_ours(group):
                return super(TpuAttention, self).plan(
                    state, view, step, key, host_part, (spec,), groups
                )[0]
            check(spec)
            width = key.widths[spec.group]
            shape = kernel.Shape(
                kv_heads=spec.num_kv_heads,
                group=spec.queries_per_kv,
                dim=spec.dim_qk,
                block_tokens=group.block_tokens,
                columns=_columns(group, width),
                queries=_queries(key, spec.queries_per_kv),
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                causal=spec.causal,
            )
            tables = state.tables[spec.group][step.row, :width]
            place = _place(step, view, tables, view.slots[spec.group], key, shape)
            return AttentionPlan(place, spec, group, Static(shape, width))

        return tuple(plan_of(spec) for spec in specs)

    # ---- per layer
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
        if not isinstance(plan.static, Static):
            return super().attend(kv, layer, q, k, v, plan, sinks=sinks, return_lse=return_lse)
        if return_lse and sinks is not None:
            raise InvalidArgument("return_lse with sinks: merge applies the sink, once")
        place, shape, pool = plan.arrays, plan.static.shape, plan.group.pool
        shape = replace(shape, sinks=sinks is not None, lse=return_lse)
        cache = kv[pool]
        heads, group, dim = shape.kv_heads, shape.group, shape.dim
        dtype = cache.dtype
        # [W, TILE, planes, lanes]
        new = _in_planes(jnp, k.astype(dtype), v.astype(dtype))[place.new]
        units, queries = place.token.shape
        grouped = q.astype(dtype).reshape(-1, heads, group, dim)[place.token]  # [I, Q, Hkv, G, D]
        grouped = jnp.moveaxis(grouped, 2, 1).reshape(units, heads, queries * group, dim)
        if sinks is not None:
            by_head = sinks.astype(jnp.float32).reshape(heads, 1, group, 1)
            sinks = jnp.broadcast_to(by_head, (heads, queries, group, 1)).reshape(heads, -1, 1)
        out, lse, cache = kernel.attend(
            grouped, jnp.moveaxis(new, 2, 1), sinks, cache, layer, place.work, plan.static.width,
            shape, self._interpret,
        )  # fmt: skip
        first = dim if shape.is_packed else 0
        out = _by_token(out[..., first : first + dim], place.place, shape)
        live = place.place >= 0
        out = jnp.where(live[:, None, None], out, 0).astype(q.dtype)
        if lse is not None:
            lse = jnp.where(live[:, None], _by_token(lse, place.place, shape)[..., 0], -jnp.inf)
        return out, lse, (*kv[:pool], cache, *kv[pool + 1 :])


def _is_ours(group: KVGroup) -> bool:
    return why_not(group.spec) is None and group.block_tokens % TILE == 0


def _columns(group: KVGroup, width: int) -> int:
    planes, lanes = kernel.planes(group.spec.num_kv_heads, group.spec.dim_qk)
    block = planes * lanes * group.block_tokens * jnp.dtype(group.spec.kv.dtype).itemsize
    return max(1, min(width, BUFFER_BYTES // block))


def _queries(key: BucketKey, group: int) -> int:
    """Tokens of a unit: a power of two near the mean of a row, and no more than a unit takes."""
    mean = max(1, key.tokens // key.rows)
    most = max(1, MAX_UNIT_ROWS // group)
    return min(1 << (mean.bit_length() - 1), 1 << (most.bit_length() - 1))


def _in_planes(xp: Any, k: Any, v: Any) -> Any:
    """[..., Hkv, D] twice -> [..., planes, lanes]; lanes without a value are 0."""
    heads, dim = k.shape[-2:]
    lanes = kernel.planes(heads, dim)[1]
    if kernel.is_packed(dim):
        both = xp.concatenate((k, v), -1)
    else:
        both = xp.stack((k, v), -2).reshape(*k.shape[:-2], 2 * heads, dim)
    missing = lanes - both.shape[-1]
    return xp.pad(both, [(0, 0)] * (both.ndim - 1) + [(0, missing)]) if missing else both


def _by_token(x: Array, place: Array, shape: kernel.Shape) -> Array:
    """[I, Hkv, Q * G, ...] -> [T, Hq, ...]."""
    units, heads, rows, *rest = x.shape
    x = jnp.moveaxis(x.reshape(units, heads, rows // shape.group, shape.group, *rest), 2, 1)
    flat = x.reshape(-1, heads * shape.group, *rest)
    return flat.at[jnp.maximum(place, 0)].get(mode="clip")


# ---------------------------------------------------------------- the plan
def _place(
    step: StepInput, view: StepView, tables: Array, slots: Array, key: BucketKey,
    shape: kernel.Shape,
) -> Place:  # fmt: skip
    rows, tokens, block_tokens = key.rows, key.tokens, shape.block_tokens
    start, counts = step.query_start[:-1], step.query_start[1:] - step.query_start[:-1]
    own = jnp.arange(tokens, dtype=jnp.int32) - step.query_start[view.sequence]  # in its row

    # units: each row in pieces of `queries` tokens
    queries = shape.queries
    pieces = (counts + queries - 1) // queries
    after = jnp.cumsum(pieces)
    most = tokens if queries == 1 else min(tokens, tokens // queries + rows)
    unit = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(after, unit, side="right").astype(jnp.int32), rows - 1)
    first_token = (unit - after[row] + pieces[row]) * queries  # in its row
    token = start[row][:, None] + first_token[:, None] + jnp.arange(queries, dtype=jnp.int32)
    num = jnp.clip(counts[row] - first_token, 0, queries)
    length = view.seq_lens[row]
    position = length - counts[row] + first_token
    seen = jnp.minimum(position + num, length) if shape.causal else length
    low = jnp.zeros_like(position)
    if shape.window is not None:
        low = jnp.maximum(position - shape.window + 1, 0)
    column = low // block_tokens
    reach = shape.columns * block_tokens
    steps = jnp.maximum(-(-(seen - column * block_tokens) // reach), 1)
    place = (after - pieces)[view.sequence] * queries + own

    # writes: each row in tiles of TILE slots
    is_first = view.valid & ((own == 0) | (view.positions % TILE == 0))
    number = jnp.cumsum(is_first.astype(jnp.int32)) - 1  # of the tile that a token goes into
    most_writes = min(tokens, tokens // TILE + 2 * rows)
    index = jnp.where(is_first, number, most_writes)
    at = (
        jnp.zeros(most_writes, jnp.int32)
        .at[index]
        .set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
    )  # first token of each tile
    from_slot = view.positions[at] % TILE
    rest = step.query_start[view.sequence[at] + 1] - at
    to_slot = jnp.minimum(from_slot + rest, TILE)
    new = at[:, None] - from_slot[:, None] + jnp.arange(TILE, dtype=jnp.int32)
    slot = slots[at]
    work = kernel.Work(
        num_writes=number[-1:] + 1,
        write_block=slot // block_tokens,
        write_tile=slot % block_tokens // TILE,
        write_from=from_slot,
        write_to=to_slot,
        num_units=after[-1:],
        unit_row=row,
        unit_position=position,
        unit_queries=num,
        unit_column=column,
        unit_steps=steps,
        unit_length=seen,
        tables=tables.reshape(-1),
    )
    work = kernel.Work(*(x.astype(jnp.int32) for x in work))
    return Place(
        work,
        jnp.clip(token, 0, tokens - 1),
        jnp.where(view.valid, place, -1),
        jnp.clip(new, 0, tokens - 1),
    )
