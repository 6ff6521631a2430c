"""A paged-attention kernel of our own in numpy, in small steps that a fault or a variant overrides.

Tiles of keys with online softmax, splits that are merged by their log-sum-exp, tiles of queries. In
float64, float32, bfloat16 and float16: accumulation in float32 or better, one rounding at the end.

Knows: the contract of attention, the cache's layouts. Does not know: faults, cases, runtimes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_core.backend import KV, AttentionPlan, AttentionSpec, HostStep, KVGroup
from vllm_core.bindings.numpy import NumpyAttention
from vllm_core.errors import InvalidArgument
from vllm_core.ops import Array, BucketKey, DeviceState, HostArray, StepInput, StepView


class Arrays(NamedTuple):
    """What the kernel needs of a step, per spec."""

    slots: HostArray  # [T]
    tables: HostArray  # [S, M]
    query_start: HostArray  # [S+1]
    seq_lens: HostArray  # [S]
    valid: HostArray  # [T]
    split: HostArray  # [3]


@dataclass(frozen=True)
class Row:
    """Some consecutive tokens of one row: a tile of queries."""

    index: int
    """Which row of the step."""
    begin: int
    end: int
    """Tokens of the tile."""
    first: int
    """First token of the row in this step."""
    num_queries: int
    """Tokens of the row in this step."""
    length: int
    """Of the sequence, this step's tokens counted."""
    block_tokens: int

    @property
    def cached(self) -> int:
        return self.length - self.num_queries


class Sums(NamedTuple):
    """Of a softmax under way."""

    top: HostArray  # [Hq, n] largest score
    total: HostArray  # [Hq, n] sum of exp(score - top)
    out: HostArray  # [Hq, n, Dv] weighted values, not yet divided


def wide(x: HostArray) -> HostArray:
    return x if x.dtype == np.float64 else x.astype(np.float32)


class Kernel(NumpyAttention):
    """Right as it stands. Class attributes are its knobs."""

    TILE = 64
    """Keys per turn; 0: all at once."""
    BACKWARDS = False
    """Tiles from the last key to the first."""
    SPLITS = 1
    """Parts of the keys whose results are merged at the end."""
    QUERIES = 64
    """Queries per tile."""
    LAYOUT = (0, 1, 2, 3, 4, 5)
    """Order in memory of (block, layer, K or V, token, head, dim); the block stays first."""

    # ---- the cache
    def _view(self, kv: KV, group: KVGroup) -> HostArray:
        """[num_blocks, layers, 2, BT, Hkv, D], whatever the layout."""
        pool: HostArray = kv[group.pool]
        shape = (pool.shape[0], *self._shape(group))
        stored = pool.reshape([shape[axis] for axis in self.LAYOUT])
        view: HostArray = stored.transpose(np.argsort(self.LAYOUT))
        return view

    def layout_fingerprint(self, group: KVGroup) -> str:
        return f"zoo {self.LAYOUT} {self._shape(group)} {self.dtype}"

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
        return tuple(
            AttentionPlan(
                self.arrays(state, view, step, key, host_part, spec), spec, groups[spec.group]
            )
            for spec in specs
        )

    def arrays(
        self,
        state: DeviceState,
        view: StepView,
        step: StepInput,
        key: BucketKey,
        host_part: Any,
        spec: AttentionSpec,
    ) -> Arrays:
        return Arrays(
            self.slots(view, spec),
            self.tables(state, step, key, spec),
            np.array(step.query_start),
            self.lengths(view, host_part),
            np.array(view.valid),
            np.array(step.split),
        )

    def slots(self, view: StepView, spec: AttentionSpec) -> HostArray:
        return np.array(view.slots[spec.group])

    def tables(
        self, state: DeviceState, step: StepInput, key: BucketKey, spec: AttentionSpec
    ) -> HostArray:
        table: HostArray = state.tables[spec.group][step.row, : key.widths[spec.group]]
        return table

    def lengths(self, view: StepView, host_part: Any) -> HostArray:
        return np.array(view.seq_lens)

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
        if return_lse and sinks is not None:
            raise InvalidArgument("return_lse with sinks: merge applies the sink, once")
        cache = self._view(kv, plan.group)
        layer = int(layer)
        self.write(cache, layer, k, v, plan)
        out = np.zeros((q.shape[0], plan.spec.num_q_heads, plan.spec.dim_v), q.dtype)
        lse = np.full(q.shape[:2], -np.inf, np.float32)
        for row in self.rows(plan):
            here = slice(row.begin, row.end)
            j = self.keys_of(row, plan.spec)
            keys, values = self.gather(cache, layer, row, j, plan)
            sums = self.softmax(q[here], keys, values, row, j, plan.spec)
            if return_lse:
                lse[here] = self.lse(sums).T
            if sinks is not None:
                sums = self.with_sink(sums, wide(sinks)[:, None])
            out[here] = self.rounded(self.divided(sums).swapaxes(0, 1), q.dtype)
        return out, lse if return_lse else None, kv

    def rows(self, plan: AttentionPlan) -> Iterator[Row]:
        """Tiles of queries of every row that has tokens."""
        arrays, size = plan.arrays, plan.group.block_tokens
        for index, length in enumerate(arrays.seq_lens):
            first, end = int(arrays.query_start[index]), int(arrays.query_start[index + 1])
            for begin in range(first, end, self.QUERIES):
                until = min(end, begin + self.QUERIES)
                yield Row(index, begin, until, first, end - first, int(length), size)

    def write(
        self, cache: HostArray, layer: int, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> None:
        """Padding goes to slot 0, in the null block."""
        size, slots = plan.group.block_tokens, plan.arrays.slots
        cache[slots // size, layer, 0, slots % size] = self.stored(k)
        cache[slots // size, layer, 1, slots % size] = self.stored(v)

    def stored(self, x: HostArray) -> HostArray:
        return x

    def keys_of(self, row: Row, spec: AttentionSpec) -> HostArray:
        """Positions of the keys that some query of the tile sees."""
        first = self.positions(row)[0] - spec.window + 1 if spec.window else 0
        last = int(self.positions(row)[-1]) + 1 if spec.causal else row.length
        return np.arange(max(0, first), max(last, 0))

    def gather(
        self, cache: HostArray, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        """[keys, Hkv, D] twice."""
        blocks, offsets = self.blocks(row, j, plan), self.offsets(j, plan)
        return cache[blocks, layer, 0, offsets], cache[blocks, layer, 1, offsets]

    def blocks(self, row: Row, j: HostArray, plan: AttentionPlan) -> HostArray:
        found: HostArray = plan.arrays.tables[row.index, j // plan.group.block_tokens]
        return found

    def offsets(self, j: HostArray, plan: AttentionPlan) -> HostArray:
        return j % plan.group.block_tokens

    def positions(self, row: Row) -> HostArray:
        """Of the tile's queries: aligned with the end of the sequence."""
        return row.cached + np.arange(row.begin - row.first, row.end - row.first)

    def visible(self, row: Row, j: HostArray, spec: AttentionSpec) -> HostArray:
        """[n, keys]"""
        t = self.positions(row)[:, None]
        seen: HostArray = np.broadcast_to(j < row.length, (len(t), len(j)))
        if spec.causal:
            seen = seen & (j <= t)
        if spec.window is not None:
            seen = seen & (j > t - spec.window)
        return seen

    # ---- scores
    def kv_heads(self, spec: AttentionSpec) -> HostArray:
        """[Hq] the KV head of each query head."""
        return np.arange(spec.num_q_heads) // spec.queries_per_kv

    def scale(self, spec: AttentionSpec) -> float:
        return spec.scale

    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        """q [Hq, n, D], keys [Hq, L, D] -> [Hq, n, L]."""
        product: HostArray = q @ keys.swapaxes(1, 2)
        return product

    def cap(self, score: HostArray, softcap: float) -> HostArray:
        return softcap * np.tanh(score / softcap)

    def scores(
        self, q: HostArray, keys: HostArray, seen: HostArray, row: Row, spec: AttentionSpec
    ) -> HostArray:
        """[Hq, n, L], -inf where not visible."""
        score = self.dot(q, keys) * np.asarray(self.scale(spec), q.dtype)
        if spec.softcap is not None:
            score = self.cap(score, spec.softcap)
        return self.masked(score, seen)

    def masked(self, score: HostArray, seen: HostArray) -> HostArray:
        return np.where(seen, score, -np.inf).astype(score.dtype)

    # ---- softmax
    def softmax(
        self,
        q: HostArray,
        keys: HostArray,
        values: HostArray,
        row: Row,
        j: HostArray,
        spec: AttentionSpec,
    ) -> Sums:
        heads = self.kv_heads(spec)
        queries = wide(q).swapaxes(0, 1)
        keys, values = (wide(x).swapaxes(0, 1)[heads] for x in (keys, values))
        seen = self.visible(row, j, spec)
        parts = []
        for split in self.splits(len(j)):
            sums = self.empty(queries, spec)
            for tile in self.tiles(split):
                score = self.scores(queries, keys[:, tile], seen[:, tile], row, spec)
                sums = self.update(sums, score, values[:, tile])
            parts.append(sums)
        return self.merged(parts)

    def splits(self, num_keys: int) -> list[range]:
        size = max(1, -(-num_keys // self.SPLITS))
        return [range(i, min(num_keys, i + size)) for i in range(0, max(num_keys, 1), size)]

    def tiles(self, split: range) -> list[slice]:
        size = self.TILE or max(1, len(split))
        found = [slice(i, min(split.stop, i + size)) for i in range(split.start, split.stop, size)]
        return found[::-1] if self.BACKWARDS else found

    def empty(self, queries: HostArray, spec: AttentionSpec) -> Sums:
        shape = queries.shape[:2]
        kind = queries.dtype
        return Sums(
            np.full(shape, -np.inf, kind),
            np.zeros(shape, kind),
            np.zeros((*shape, spec.dim_v), kind),
        )

    def exp(self, x: HostArray) -> HostArray:
        y: HostArray = np.exp(x)
        return y

    def update(self, sums: Sums, score: HostArray, values: HostArray) -> Sums:
        top = np.maximum(sums.top, score.max(-1, initial=-np.inf))
        base = np.where(top > -np.inf, top, 0)
        keep, p = self.exp(sums.top - base), self.exp(score - base[..., None])
        total = sums.total * keep + self.summed(p)
        return Sums(top, total, sums.out * keep[..., None] + self.weighed(p, values))

    def summed(self, p: HostArray) -> HostArray:
        total: HostArray = p.sum(-1)
        return total

    def weighed(self, p: HostArray, values: HostArray) -> HostArray:
        """p [Hq, n, L], values [Hq, L, Dv]."""
        product: HostArray = p @ values
        return product

    def merged(self, parts: list[Sums]) -> Sums:
        """By the largest score of all parts."""
        if len(parts) == 1:
            return parts[0]
        top = np.max([part.top for part in parts], 0)
        base = np.where(top > -np.inf, top, 0)
        keep = [self.exp(part.top - base) for part in parts]
        total = sum((p.total * w for p, w in zip(parts, keep)), np.zeros_like(top))
        out = sum((p.out * w[..., None] for p, w in zip(parts, keep)), np.zeros_like(parts[0].out))
        return Sums(top, total, out)

    def with_sink(self, sums: Sums, sink: HostArray) -> Sums:
        """sink [Hq, 1] joins the sum and adds no value."""
        top = np.maximum(sums.top, sink)
        keep = self.exp(sums.top - top)
        return Sums(top, sums.total * keep + self.exp(sink - top), sums.out * keep[..., None])

    def lse(self, sums: Sums) -> HostArray:
        with np.errstate(divide="ignore"):
            value: HostArray = np.log(sums.total) + sums.top
        return value

    def divided(self, sums: Sums) -> HostArray:
        """[Hq, n, Dv]"""
        found: HostArray = sums.out / np.where(sums.total > 0, sums.total, 1)[..., None]
        return found

    def rounded(self, out: HostArray, dtype: np.dtype[Any]) -> HostArray:
        return out.astype(dtype)


class HostLengths(Kernel):
    """Takes the lengths from the host's part of the plan, as kernels with their own grid do."""

    def plan_host(self, host: HostStep, key: BucketKey) -> dict[str, HostArray]:
        lengths = np.zeros(key.rows, np.int32)
        lengths[: len(host.seq_len)] = host.seq_len
        return {"seq_lens": lengths}

    def lengths(self, view: StepView, host_part: Any) -> HostArray:
        found: HostArray = host_part["seq_lens"]
        return found
