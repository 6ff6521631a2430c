"""Ragged paged attention in Pallas: one call writes the step's K and V and attends, whatever mix of
prompts, chunks and decoding rows the step holds.

Cache of a pool: [blocks, layers, planes, BT, lanes]. A plane is K or V of one KV head, or, where
both fit the 128 lanes of a register, K beside V; a block of one layer is one contiguous copy.

The grid first walks over the writes, tiles of TILE slots of one block: the tile is fetched, the new
tokens are put in place, it is stored; a ring of RING tiles hides the latency. Then it walks over
the units: some queries of one row. The blocks that a unit sees come in `columns` at a time through
a ring of buffers; while one is met the next is on its way, the first of the following unit too.

What stands in slots that nobody wrote may be NaN: scores are selected, values are zeroed.

Knows: this layout, visibility, asynchronous copies. Does not know: who owns a block, models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = Any
Ref = Any

LANES = 128
TILE = 16
"""Slots that are written at a time: what the memory of the device addresses in 16-bit numbers."""
RING = 4
"""Tiles under way while K and V are written."""
BUFFERS = 2
"""Blocks of keys under way while others are met."""
NEVER = float(np.finfo(np.float32).min)
"""A score that is not seen: a number, since the difference of two infinities is none."""


@dataclass(frozen=True)
class Shape:
    """Static facts of a kernel."""

    kv_heads: int
    group: int
    """Query heads that share a KV head."""
    dim: int
    block_tokens: int
    columns: int
    """Columns of a block table that are met at a time."""
    queries: int
    """Tokens of a unit."""
    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    sinks: bool = False
    lse: bool = False

    @property
    def is_packed(self) -> bool:
        """K beside V in one plane."""
        return is_packed(self.dim)

    @property
    def planes(self) -> int:
        return planes(self.kv_heads, self.dim)[0]

    @property
    def lanes(self) -> int:
        return planes(self.kv_heads, self.dim)[1]


def is_packed(dim: int) -> bool:
    """Whether K and V of one head fit the lanes of a register together."""
    return 2 * dim <= LANES


def planes(kv_heads: int, dim: int) -> tuple[int, int]:
    """(planes, lanes of one) of a block."""
    if is_packed(dim):
        return kv_heads, LANES
    return 2 * kv_heads, -(-dim // LANES) * LANES


class Work(NamedTuple):
    """What the step asks for, in scalars: [..] int32, made once per step."""

    num_writes: Array  # [1]
    write_block: Array  # [W] where a tile lies
    write_tile: Array  # [W] which tile of the block
    write_from: Array  # [W] first slot of the tile that is new
    write_to: Array  # [W] behind the last
    num_units: Array  # [1]
    unit_row: Array  # [I] of the table
    unit_position: Array  # [I] of its first query
    unit_queries: Array  # [I]
    unit_column: Array  # [I] first column that it sees
    unit_steps: Array  # [I] how often `columns` columns are met, at least once
    unit_length: Array  # [I] keys of its row
    tables: Array  # [S * M]


def attend(
    q: Array,
    new: Array,
    sinks: Array | None,
    cache: Array,
    layer: Array | int,
    work: Work,
    width: int,
    shape: Shape,
    interpret: Any = False,
) -> tuple[Array, Array | None, Array]:
    """One layer of a step.

    q [I, Hkv, Q * G, D], new [W, planes, TILE, lanes] of the cache's dtype, sinks [Hkv, Q * G, 1]
    float32, cache [P, L, planes, BT, lanes], width: columns of a table ->
    out [I, Hkv, Q * G, lanes] (of which V's dims count), natural LSE [I, Hkv, Q * G, 1], cache.
    """
    num_units, kv_heads, rows, _ = q.shape
    num_writes = new.shape[0]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, shape.lanes - q.shape[-1])))

    def unit(i: Array, *_: Ref) -> tuple[Array, int, int, int]:
        return jnp.maximum(i - num_writes, 0), 0, 0, 0

    def write(i: Array, *_: Ref) -> tuple[Array, int, int, int]:
        return jnp.minimum(i, num_writes - 1), 0, 0, 0

    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), *work)
    units = pl.BlockSpec((1, kv_heads, rows, shape.lanes), unit)
    in_specs = [units, pl.BlockSpec((1, *new.shape[1:]), write)]
    inputs = [q, new]
    if shape.sinks:
        in_specs.append(pl.BlockSpec((kv_heads, rows, 1), lambda i, *_: (0, 0, 0)))
        inputs.append(sinks)
    in_specs.append(pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM))
    inputs.append(cache)
    out_specs = [units]
    outputs = [_array(q.shape, q.dtype)]
    if shape.lse:
        out_specs.append(pl.BlockSpec((1, kv_heads, rows, 1), unit))
        outputs.append(_array((*q.shape[:3], 1), jnp.float32))
    out_specs.append(pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM))
    outputs.append(_array(cache.shape, cache.dtype))
    block = cache.shape[2:]
    results = pl.pallas_call(
        partial(_kernel, shape=shape, width=width, num_writes=num_writes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_writes + num_units,),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((RING, block[0], TILE, block[2]), cache.dtype),
                pltpu.SemaphoreType.DMA((2, RING)),
                pltpu.VMEM((BUFFERS, shape.columns, *block), cache.dtype),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((kv_heads, rows, shape.lanes), jnp.float32),
            ],
        ),
        out_shape=outputs,
        input_output_aliases={len(scalars) + len(inputs) - 1: len(outputs) - 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="ragged_paged_attention",
    )(*scalars, *inputs)
    return results[0], results[1] if shape.lse else None, results[-1]


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _kernel(layer_ref: Ref, *refs: Ref, shape: Shape, width: int, num_writes: int) -> None:
    rest = list(refs)
    work = Work(*(rest.pop(0) for _ in Work._fields))
    q, new = rest.pop(0), rest.pop(0)
    sinks = rest.pop(0) if shape.sinks else None
    rest.pop(0)  # the cache is read and written through its output
    out = rest.pop(0)
    lse = rest.pop(0) if shape.lse else None
    cache, tiles, tile_sems, keys, key_sems, turn, top, total, sums = rest
    layer, step = layer_ref[0], pl.program_id(0)
    _write(work, cache, layer, new, tiles, tile_sems, step)

    unit = step - num_writes

    @pl.when((unit >= 0) & (unit < work.num_units[0]))
    def attend_unit() -> None:
        ring = Ring(work, cache, layer, keys, key_sems, width, shape)

        @pl.when(unit == 0)
        def begin() -> None:
            turn[0] = 0
            ring.start(0, 0, 0)

        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

        def meet(at: Array, _: Any) -> None:
            buffer = lax.rem(turn[0], BUFFERS)
            is_last = at + 1 == work.unit_steps[unit]
            next_unit, next_at = unit + is_last, jnp.where(is_last, 0, at + 1)

            @pl.when(next_unit < work.num_units[0])
            def fetch_next() -> None:
                ring.start(next_unit, next_at, 1 - buffer)

            ring.wait(unit, at, buffer)
            _meet(work, unit, at, q, keys, buffer, shape, top, total, sums)
            turn[0] = turn[0] + 1

        lax.fori_loop(0, work.unit_steps[unit], meet, None)
        _finish(out, lse, sinks, shape, top, total, sums)

    @pl.when(unit >= work.num_units[0])
    def leave_blank() -> None:
        out[...] = jnp.zeros_like(out)
        if lse is not None:
            lse[...] = jnp.full_like(lse, -jnp.inf)


# ---------------------------------------------------------------- what is new
def _write(
    work: Work, cache: Ref, layer: Array, new: Ref, tiles: Ref, sems: Ref, step: Array
) -> None:
    """One tile; those that follow are on their way."""
    count = work.num_writes[0]

    def place(w: Array) -> Ref:
        slots = pl.ds(pl.multiple_of(work.write_tile[w] * TILE, TILE), TILE)
        return cache.at[work.write_block[w], layer, :, slots]

    def fetch(w: Array) -> Any:
        slot = lax.rem(w, RING)
        return pltpu.make_async_copy(place(w), tiles.at[slot], sems.at[0, slot])

    def start_fetch(w: Array) -> None:
        pl.when(w < count)(lambda: fetch(w).start())

    def store(w: Array) -> Any:
        slot = lax.rem(w, RING)
        return pltpu.make_async_copy(tiles.at[slot], place(w), sems.at[1, slot])

    @pl.when(step < count)
    def write_tile() -> None:
        @pl.when(step == 0)
        def begin() -> None:
            for ahead in range(RING - 1):
                start_fetch(jnp.int32(ahead))

        pl.when(step > 0)(lambda: store(step - 1).wait())
        start_fetch(step + RING - 1)
        fetch(step).wait()
        slot = lax.rem(step, RING)
        at = lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 1)
        is_new = (at >= work.write_from[step]) & (at < work.write_to[step])
        tiles[slot] = _select(is_new, new[0], tiles[slot])
        store(step).start()
        pl.when(step + 1 == count)(lambda: store(step).wait())


def _select(mask: Array, a: Array, b: Array) -> Array:
    """In 32 bits: older chips have no masks of 16-bit numbers. Widening keeps every bit."""
    return jnp.where(mask, a.astype(jnp.float32), b.astype(jnp.float32)).astype(a.dtype)


# ---------------------------------------------------------------- what is seen
@dataclass(frozen=True)
class Ring:
    """The copies that bring blocks."""

    work: Work
    cache: Ref
    layer: Array
    keys: Ref
    sems: Ref
    width: int
    shape: Shape

    def start(self, unit: Array | int, at: Array | int, buffer: Array | int) -> None:
        """The blocks of the unit's turn `at`, on their way into a buffer."""
        self._each(unit, at, buffer, lambda copy: copy.start())

    def wait(self, unit: Array | int, at: Array | int, buffer: Array | int) -> None:
        """Until they are there."""
        self._each(unit, at, buffer, lambda copy: copy.wait())

    def _each(
        self, unit: Array | int, at: Array | int, buffer: Array | int, act: Callable[[Any], None]
    ) -> None:
        work, shape = self.work, self.shape
        first = work.unit_column[unit] + at * shape.columns
        end = lax.div(work.unit_length[unit] + (shape.block_tokens - 1), shape.block_tokens)
        for i in range(shape.columns):

            @pl.when(first + i < end)
            def one(i: int = i) -> None:
                block = work.tables[work.unit_row[unit] * self.width + first + i]
                source = self.cache.at[block, self.layer]
                act(pltpu.make_async_copy(source, self.keys.at[buffer, i], self.sems.at[buffer]))


def _meet(
    work: Work, unit: Array, at: Array, q: Ref, keys: Ref, buffer: Array, shape: Shape,
    top: Ref, total: Ref, sums: Ref,
) -> None:  # fmt: skip
    """All heads of the unit with the keys of one buffer, onto the running sums."""
    rows, count = q.shape[2], shape.columns * shape.block_tokens
    first = (work.unit_column[unit] + at * shape.columns) * shape.block_tokens
    length = work.unit_length[unit]
    key = first + lax.broadcasted_iota(jnp.int32, (rows, count), 1)
    query = lax.div(lax.broadcasted_iota(jnp.int32, (rows, count), 0), shape.group)
    position = work.unit_position[unit] + query
    seen = (key < length) & (query < work.unit_queries[unit])
    if shape.causal:
        seen &= key <= position
    if shape.window is not None:
        seen &= key > position - shape.window
    is_key = first + lax.broadcasted_iota(jnp.int32, (count, shape.lanes), 0) < length
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    for head in range(shape.kv_heads):
        k_plane, v_plane = (head, head) if shape.is_packed else (2 * head, 2 * head + 1)
        k = keys[buffer, :, k_plane].reshape(count, shape.lanes)
        v = keys[buffer, :, v_plane].reshape(count, shape.lanes)
        v = _select(is_key, v, jnp.zeros_like(v))
        if shape.is_packed:
            k = v  # a dead V beside K would meet the 0 in q
        s = lax.dot_general(
            q[0, head], k, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        s = s * shape.scale
        if shape.softcap is not None:
            s = shape.softcap * jnp.tanh(s / shape.softcap)
        s = jnp.where(seen, s, NEVER)
        before = top[head]
        now = jnp.maximum(before, jnp.max(s, -1, keepdims=True))
        p = jnp.where(seen, jnp.exp(s - now), 0.0)
        keep = jnp.exp(before - now)
        top[head] = now
        total[head] = total[head] * keep + jnp.sum(p, -1, keepdims=True)
        sums[head] = sums[head] * keep + lax.dot_general(
            p.astype(v.dtype), v, (((1,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip


def _finish(
    out: Ref, lse: Ref | None, sinks: Ref | None, shape: Shape, top: Ref, total: Ref, sums: Ref
) -> None:
    for head in range(shape.kv_heads):
        largest, weight, x = top[head], total[head], sums[head]
        if lse is not None:
            lse[0, head] = jnp.where(weight == 0, -jnp.inf, largest + jnp.log(weight))
        if sinks is not None:
            sink = sinks[head]
            both = jnp.maximum(largest, sink)
            keep = jnp.exp(largest - both)
            weight, x = weight * keep + jnp.exp(sink - both), x * keep
        out[0, head] = (x / jnp.where(weight == 0, 1.0, weight)).astype(out.dtype)
