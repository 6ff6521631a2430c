"""Attention over a paged cache in plain jax.numpy: tiles of queries, online softmax over chunks.

A tile is up to `queries` consecutive tokens of one row, so that a chunk of keys is gathered once
per tile and not once per token; where a step has hardly more tokens than rows a tile is one token.
The loop runs from the first to the last chunk of table columns that any query sees, whatever the
width of the table; a chunk that a query does not see leaves its sums as they are, bit for bit.

Knows: its layout of the cache, plans, masks. Does not know: models, who owns a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vllm_core.backend import KV, AttentionBackend, AttentionPlan, AttentionSpec, KVGroup
from vllm_core.bindings.jax.memory import allocating
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import Array, BucketKey, DeviceState, HostArray, StepInput, StepView

DTYPES = ("float32", "bfloat16", "float16")
_MAX_QUERIES = 64
_CHUNK_TOKENS = 64
"""Keys per turn of the loop. 16, 64 and 128 measured on two CPU cores: decode likes fewer, prefill
more, 64 is within a third of the best for both."""


@dataclass(frozen=True)
class Tiling:
    """Static facts of a plan."""

    queries: int
    """Tokens per tile."""
    columns: int
    """Table columns per turn."""


class Tiles(NamedTuple):
    """The step cut into I tiles of Q tokens, and the blocks that they read."""

    block: Array  # [T] where the token's K and V go
    offset: Array  # [T]
    token: Array  # [I, Q] tokens of each tile
    place: Array  # [T] where each token stands in [I * Q]
    position: Array  # [I, Q] of the query; -1 where there is none
    length: Array  # [I] of the sequence
    row: Array  # [I] of the table
    tables: Array  # [S, M] blocks, whole chunks wide
    first: Array  # [] chunk
    last: Array  # [] chunk, exclusive


class JaxAttention(AttentionBackend):
    """Cache of a pool: [num_blocks, layers, 2, BT, Hkv, D]; 16-bit floats are held as their bits.

    As bits, because XLA on a CPU widens a whole bfloat16 array to scatter into it: about 0.4 s per
    layer and GB of cache, measured with jax 0.10.2.
    """

    def __init__(self, device: jax.Device, dtype: str | None = None) -> None:
        """dtype: the model's, and so that of caches; None: each group's, if the binding has it."""
        self._device = device
        self._dtypes = DTYPES if dtype is None else (dtype,)

    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (16, 32, 8, 4, 2, 1, 64, 128)

    def block_bytes(self, group: KVGroup) -> int:
        return math.prod(self.block_shape(group)) * _dtype(group).itemsize

    def block_shape(self, group: KVGroup) -> tuple[int, ...]:
        """Of one block of a pool, over all layers of the group."""
        spec = group.spec
        return (group.layers, 2, group.block_tokens, spec.num_kv_heads, spec.dim_qk)

    def storage(self, group: KVGroup) -> np.dtype[Any]:
        """What the array on the device is made of."""
        dtype = _dtype(group)
        return np.dtype(np.uint16) if dtype.itemsize == 2 else dtype

    def pack(self, group: KVGroup, arrays: dict[str, HostArray]) -> HostArray:
        """{k, v} [L, n, BT, Hkv, D] -> [n, *block_shape], in the group's dtype."""
        return np.stack([np.moveaxis(arrays[name], 0, 1) for name in "kv"], 2)

    def unpack(self, group: KVGroup, blocks: HostArray) -> dict[str, HostArray]:
        """The way back."""
        blocks = np.moveaxis(blocks, 1, 0)
        return {"k": blocks[:, :, 0].copy(), "v": blocks[:, :, 1].copy()}

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        shapes: dict[int, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for group in groups:
            check(group.spec)
            kv = group.spec.kv
            kv.refuse_unless(kv.dtype if kv.dtype in self._dtypes else self._dtypes[0])
            found = (num_blocks[group.pool], *self.block_shape(group)), self.storage(group)
            if shapes.setdefault(group.pool, found) != found:
                raise NotSupported(
                    f"KV groups of one pool need one shape here: {shapes[group.pool]} and {found}"
                )
        pools = []
        for pool in sorted(shapes):
            shape, dtype = shapes[pool]
            with allocating(self._device, f"{shape[0]} KV blocks"):
                pools.append(jnp.zeros(shape, dtype).block_until_ready())
        return tuple(pools)

    def layout_fingerprint(self, group: KVGroup) -> str:
        return f"block-layer-kv-token-head-dim {self.block_shape(group)} {_dtype(group)}"

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        blocks = np.array(_take(kv[group.pool], _padded(ids)))[: len(ids)]
        return self.unpack(group, blocks.view(_dtype(group)))

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        padded = _padded(ids)
        blocks = np.zeros((len(padded), *self.block_shape(group)), _dtype(group))
        blocks[: len(ids)] = self.pack(group, arrays)
        blocks = blocks.view(self.storage(group))
        return _replaced(kv, group, _place(kv[group.pool], padded, blocks))

    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        return _replaced(kv, group, _copy(kv[group.pool], src, dst))

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
            check(spec)
            group = groups[spec.group]
            tiling = Tiling(
                _queries_per_tile(key.tokens, key.rows), max(1, _CHUNK_TOKENS // group.block_tokens)
            )
            tables = state.tables[spec.group][step.row, : key.widths[spec.group]]
            slots = view.slots[spec.group]
            tiles = _cut(step, view, tables, slots, spec, group.block_tokens, tiling)
            return AttentionPlan(tiles, spec, group, tiling)

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
        spec, tiles = plan.spec, plan.arrays
        cache = kv[plan.group.pool]
        new = jnp.stack((k, v), 1).astype(_dtype(plan.group))  # [T, 2, Hkv, D]
        new = lax.bitcast_convert_type(new, cache.dtype)
        cache = cache.at[tiles.block, layer, :, tiles.offset].set(new, mode="drop")

        def keys_and_values(blocks: Array) -> Array:
            return cache.at[blocks, layer].get(mode="clip")

        grouped = q.astype(jnp.float32).reshape(q.shape[0], spec.num_kv_heads, -1, spec.dim_qk)
        top, total, out = _softmax_over_chunks(grouped[tiles.token], keys_and_values, plan)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(1, spec.num_kv_heads, -1, 1)
            top, total, out = _with_sink(top, total, out, sink)
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        out = _by_token(out, tiles).reshape(q.shape[0], spec.num_q_heads, spec.dim_v)
        out = jnp.where(_is_live(tiles)[:, None, None], out, 0.0).astype(q.dtype)
        lse = None
        if return_lse:
            lse = _by_token(jnp.log(total) + top, tiles).reshape(q.shape[:2])
            lse = jnp.where(_is_live(tiles)[:, None], lse, -jnp.inf)
        return out, lse, _replaced(kv, plan.group, cache)


# ---------------------------------------------------------------- plan: once per step
def _queries_per_tile(tokens: int, rows: int) -> int:
    """The mean number of tokens per row as a power of two: I = T/Q + S is about 3 S at most."""
    mean = max(1, tokens // rows)
    return min(_MAX_QUERIES, 1 << (mean.bit_length() - 1))


def _cut(
    step: StepInput,
    view: StepView,
    tables: Array,
    slots: Array,
    spec: AttentionSpec,
    block_tokens: int,
    tiling: Tiling,
) -> Tiles:
    num_tokens, num_rows, Q = slots.shape[0], tables.shape[0], tiling.queries
    num_tiles = num_tokens if Q == 1 else (num_tokens + num_rows * (Q - 1)) // Q
    counts = (step.query_start[1:] - step.query_start[:-1] + Q - 1) // Q  # [S] tiles of each row
    after = jnp.cumsum(counts)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.searchsorted(after, tile, side="right").astype(jnp.int32)
    row = jnp.minimum(row, num_rows - 1)
    start = step.query_start[row] + (tile - after[row] + counts[row]) * Q
    token = start[:, None] + jnp.arange(Q, dtype=jnp.int32)
    live = token < step.query_start[row + 1][:, None]
    token = jnp.clip(token, 0, num_tokens - 1)
    position = jnp.where(live, view.positions[token], -1)
    length = view.seq_lens[row]

    own = jnp.arange(num_tokens, dtype=jnp.int32) - step.query_start[view.sequence]
    place = (after - counts)[view.sequence] * Q + own  # a row's tokens stand side by side
    place = jnp.where(view.valid, place, -1)

    chunk = tiling.columns * block_tokens
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % tiling.columns)))
    furthest = position if spec.causal else jnp.where(live, length[:, None] - 1, -1)
    last = (jnp.max(furthest) + chunk) // chunk
    last = jnp.minimum(last, tables.shape[1] // tiling.columns)
    first = jnp.zeros_like(last)
    if spec.window is not None:
        earliest = jnp.where(live, position - spec.window + 1, np.iinfo(np.int32).max)
        first = jnp.maximum(jnp.min(earliest), 0) // chunk
    block, offset = slots // block_tokens, slots % block_tokens
    return Tiles(block, offset, token, place, position, length, row, tables, first, last)


def _is_live(tiles: Tiles) -> Array:
    return tiles.place >= 0


def _by_token(x: Array, tiles: Tiles) -> Array:
    """[I, Hkv, G, Q, ...] -> [T, Hkv, G, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    flat = x.reshape(-1, *x.shape[2:])
    return flat.at[jnp.maximum(tiles.place, 0)].get(mode="clip")


# ---------------------------------------------------------------- attend: once per layer
def _softmax_over_chunks(
    q: Array, keys_and_values: Callable[[Array], Array], plan: AttentionPlan
) -> tuple[Array, Array, Array]:
    """q [I, Q, Hkv, G, D] -> (largest score, sum of exp, values weighted by exp).

    [I, Hkv, G, Q], the values with Dv behind; they are not yet divided by the sum.
    """
    spec, tiles, tiling = plan.spec, plan.arrays, plan.static
    chunk = tiling.columns * plan.group.block_tokens
    num_tiles, num_queries, num_kv, num_group, _ = q.shape
    contract = partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    def one_chunk(c: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sums
        columns = lax.dynamic_slice_in_dim(tiles.tables, c * tiling.columns, tiling.columns, 1)
        visible = _visible(c * chunk + jnp.arange(chunk, dtype=jnp.int32), tiles, spec)
        seen = jnp.any(visible, 1).reshape(num_tiles, tiling.columns, 1, -1, 1, 1)
        found = jnp.where(seen, keys_and_values(columns[tiles.row]), 0)  # dead slots stay dead
        found = lax.bitcast_convert_type(found, _dtype(plan.group))
        found = found.astype(jnp.float32)  # [I, columns, 2, BT, Hkv, D]
        k, v = (found[:, :, i].reshape(num_tiles, chunk, num_kv, -1) for i in (0, 1))
        score = contract("iqhgd,ikhd->ihgqk", q, k) * spec.scale
        if spec.softcap is not None:
            score = spec.softcap * jnp.tanh(score / spec.softcap)
        score = jnp.where(visible[:, None, None], score, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(score, -1))
        base = jnp.where(new_top > -jnp.inf, new_top, 0.0)
        keep, p = jnp.exp(top - base), jnp.exp(score - base[..., None])
        out = out * keep[..., None] + contract("ihgqk,ikhd->ihgqd", p, v)
        return new_top, total * keep + jnp.sum(p, -1), out

    shape = (num_tiles, num_kv, num_group, num_queries)
    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, spec.dim_v), jnp.float32),
    )
    sums: tuple[Array, Array, Array] = lax.fori_loop(tiles.first, tiles.last, one_chunk, start)
    return sums


def _visible(j: Array, tiles: Tiles, spec: AttentionSpec) -> Array:
    """[keys of the chunk] -> [I, Q, keys]."""
    position = tiles.position[:, :, None]
    visible = (j < tiles.length[:, None, None]) & (position >= 0)
    if spec.causal:
        visible &= j <= position
    if spec.window is not None:
        visible &= j > position - spec.window
    return visible


def _with_sink(top: Array, total: Array, out: Array, sink: Array) -> tuple[Array, Array, Array]:
    new_top = jnp.maximum(top, sink)
    keep = jnp.exp(top - new_top)
    return new_top, total * keep + jnp.exp(sink - new_top), out * keep[..., None]


# ---------------------------------------------------------------- the cache
def check(spec: AttentionSpec) -> None:
    """NotSupported for what no attention of this binding does, whatever its cache's format."""
    if spec.dim_v != spec.dim_qk:
        raise NotSupported("this layout needs V heads as wide as K heads")
    reserved = {
        "chunked attention": spec.chunk is not None,
        "ALiBi": spec.alibi,
        "layers that read another layer's cache": not spec.writes_kv or spec.source is not None,
    }
    for what, is_asked in reserved.items():
        if is_asked:
            raise NotSupported(f"the jax binding has no attention with {what}")


def _dtype(group: KVGroup) -> np.dtype[Any]:
    return jnp.dtype(group.spec.kv.dtype)


def _replaced(kv: KV, group: KVGroup, cache: Array) -> KV:
    return (*kv[: group.pool], cache, *kv[group.pool + 1 :])


def _padded(ids: Sequence[int]) -> HostArray:
    """Up to a power of two with the null block, so that few counts are compiled."""
    padded = np.zeros(1 << max(len(ids) - 1, 0).bit_length(), np.int32)
    padded[: len(ids)] = ids
    return padded


@jax.jit
def _take(cache: Array, ids: Array) -> Array:
    return cache[ids]


@partial(jax.jit, donate_argnums=0)
def _place(cache: Array, ids: Array, blocks: Array) -> Array:
    return cache.at[ids].set(blocks, mode="drop")


@partial(jax.jit, donate_argnums=0)
def _copy(cache: Array, src: Array, dst: Array) -> Array:
    return cache.at[dst].set(cache[src], mode="drop")
