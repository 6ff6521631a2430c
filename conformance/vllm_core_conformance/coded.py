"""Scenes whose every answer names the token that was read (R2).

Keys are random signs and follow from a token's position alone, so that the same position of another
sequence, KV head or layer has the same key: a decoy. Illegal neighbours (the next position, the
token that just left the window, slots past the end, what a slot held before the step) share keys
with legal targets too. A query is its target's key, so long that its target takes all the weight. V
spells where a token is kept: block, slot, layer, head, before or after the step.

Knows: which token each query must return. Does not know: any backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.inputs import Layout, Random, first_column
from vllm_core_conformance.steps import Scene

Numbers = NDArray[Any]

MARGIN = 40.0
"""Least distance in nats between the target's score and any other visible one's."""


@dataclass(frozen=True)
class Place:
    """Where a value came from."""

    layer: int
    block: int
    slot: int
    head: int
    stale: bool = False
    """What the slot held before the step wrote it."""


@dataclass(frozen=True)
class Coded:
    """A scene and its answers."""

    scene: Scene
    targets: Numbers
    """[t, Hq] position in the query's own sequence."""
    answers: Numbers
    """[t, Hq, Dv] of -1 and 1."""
    after: Numbers
    """[num_blocks, layers, BT, Hkv, Dv]: V after the step."""

    def named(self) -> dict[bytes, Place]:
        """Every value that there is, by its signs."""
        found: dict[bytes, Place] = {}
        for stale, values in ((True, self.scene.values), (False, self.after)):
            lead = values.shape[:4]
            for index, row in enumerate((values > 0).reshape(-1, values.shape[-1])):
                block, layer, slot, head = (int(i) for i in np.unravel_index(index, lead))
                found[row.tobytes()] = Place(layer, block, slot, head, stale)
        return found


def code(layout: Layout, rng: Random) -> Coded:
    """A coded scene of the layout; D and Dv of 64 or more."""
    shape, size = layout.shape, layout.shape.block_tokens
    key_ids = [_key_ids(layout, rng, row) for row in range(len(layout.query))]
    num_keys = 1 + max(int(ids.max()) for ids in key_ids)
    slot_ids = rng.integers(0, num_keys, (shape.num_blocks, size))
    for row, ids in enumerate(key_ids):
        j = np.arange(len(ids))
        own = layout.tables[row][j // size]
        past = j >= layout.seq_lens[row]
        live = ~past & (j >= first_column(shape, int(layout.cached[row])) * size)
        for place in (past, live):
            slot_ids[own[place], j[place] % size] = ids[place]
    targets = np.concatenate(
        [_targets(layout, rng, row, key_ids[row]) for row in range(len(layout.query))]
    )
    sequence = np.repeat(np.arange(len(layout.query)), layout.query)
    position = np.concatenate([np.arange(a, b) for a, b in zip(layout.cached, layout.seq_lens)])
    wanted = np.array([key_ids[i][row] for i, row in zip(sequence, targets)])  # [t, Hq]
    vectors, length = _vectors(rng, num_keys, shape.dim, np.unique(wanted), abs(shape.scale))
    sign = 1.0 if shape.scale > 0 else -1.0

    after, fresh = _spell(layout, rng)
    before = after.copy()
    blocks = np.array([layout.tables[i][p // size] for i, p in zip(sequence, position)])
    before[blocks, shape.layer, position % size] = fresh
    heads = np.arange(shape.num_q_heads) // shape.queries_per_kv
    target_blocks = np.array([layout.tables[i][row // size] for i, row in zip(sequence, targets)])
    answers = after[target_blocks, shape.layer, targets % size, heads]
    own_keys = np.array([key_ids[i][p] for i, p in zip(sequence, position)])

    keys = np.repeat(vectors[slot_ids][:, :, None], shape.num_kv_heads, 2)
    scene = Scene(
        shape,
        layout.state_rows,
        layout.cached,
        layout.query,
        layout.tables,
        np.repeat(keys[:, None], shape.layers, 1),
        before,
        sign * length * vectors[wanted],
        np.repeat(vectors[own_keys][:, None], shape.num_kv_heads, 1),
        after[blocks, shape.layer, position % size],
        sinks=np.full(shape.num_q_heads, -1000.0) if shape.sinks else None,
    )
    return Coded(scene, targets, answers, after)


def _key_ids(layout: Layout, rng: Random, row: int) -> Numbers:
    """Of each position up to the end of the row's last block."""
    shape, size = layout.shape, layout.shape.block_tokens
    cached, length = int(layout.cached[row]), int(layout.seq_lens[row])
    j = np.arange(-(-length // size) * size)
    if shape.window is not None:
        return j % shape.window  # the next one in looks like the last one out
    ids = j.copy()
    for p in range(max(cached, 2), length):
        if rng.random() < 0.5:
            ids[p] = ids[rng.integers(1, p)]  # the first token stays the only one of its key
    ids[length:] = ids[length - 1 - np.minimum(j[length:] - length, length - 1)]
    return ids


def _targets(layout: Layout, rng: Random, row: int, ids: Numbers) -> Numbers:
    """[queries, Hq]: visible tokens whose key no other visible token has, edges first."""
    shape, size = layout.shape, layout.shape.block_tokens
    cached, length = int(layout.cached[row]), int(layout.seq_lens[row])
    found = np.zeros((length - cached, shape.num_q_heads), np.int64)
    for query in range(length - cached):
        newest = cached + query
        first = 0 if shape.window is None else max(0, newest - shape.window + 1)
        seen = ids[first : newest + 1]
        counts = np.bincount(ids)
        alone = np.bincount(seen, minlength=len(counts))[seen] == 1
        free = first + np.flatnonzero(alone)
        decoyed = first + np.flatnonzero(alone & (counts[seen] > 1))
        ends = free[(free % size == 0) | (free % size == size - 1)]
        edge = np.array([x for x in (first, newest, cached - 1, cached) if x in free])
        choices = [x for x in (edge, decoyed, ends, free) if len(x)]
        for head in range(shape.num_q_heads):
            found[query, head] = rng.choice(choices[(head + query) % len(choices)])
    return found


def _vectors(
    rng: Random, count: int, dim: int, used: Numbers, scale: float
) -> tuple[Numbers, float]:
    """[count, dim] of signs, and how long a query must be for the margin.

    Each key is much like the one before: where a token is missing, its neighbour answers, and the
    mistake shows. An even one is more like its predecessor than like its successor, so that one
    neighbour answers and not the mean of two; blocks begin at even positions.
    """
    for _ in range(20):
        few = np.where(np.arange(count) % 2 == 0, max(1, dim // 7), dim // 4)[:, None]
        turned = rng.random((count, dim)).argsort(1) < few
        turned[0] = rng.integers(0, 2, dim)
        vectors = np.cumprod(np.where(turned, -1.0, 1.0), 0).astype(np.float32)
        overlap = vectors[used] @ vectors.T
        overlap[np.arange(len(used)), used] = -dim
        length = float(np.ceil(MARGIN / (scale * max(1.0, dim - overlap.max(initial=-dim)))))
        if length <= 128:
            return vectors.astype(np.float64), length
    raise AssertionError(f"{count} keys of {dim} signs are too much alike")


def _spell(layout: Layout, rng: Random) -> tuple[Numbers, Numbers]:
    """V of every slot, and of what the step's slots held before it; no two are alike."""
    shape = layout.shape
    lead = (shape.num_blocks, shape.layers, shape.block_tokens, shape.num_kv_heads)
    dim, num = shape.dim_v or shape.dim, int(np.prod(lead))
    num_fresh = layout.num_tokens * shape.num_kv_heads
    index = np.arange(num + num_fresh)
    num_bits = int(index[-1]).bit_length()
    signs = rng.integers(0, 2, (len(index), dim), dtype=np.int8)
    signs[:, :num_bits] = (index[:, None] >> np.arange(num_bits)) & 1
    values = (2.0 * signs - 1)[:, rng.permutation(dim)]
    fresh = values[num:].reshape(layout.num_tokens, shape.num_kv_heads, dim)
    return values[:num].reshape(*lead, dim), fresh
