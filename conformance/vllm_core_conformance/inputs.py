"""Scenes of attention: rows of given lengths laid out over a paged cache, filled by a regime.

The layout is as awkward as the seam allows: block ids permuted, the last id in use, state rows
scattered, tables wider than needed, cells past the end and behind the window stale, prefix blocks
shared. The regimes are the numbers of conformance.md: R1 normal, R3 peaked, R4 flat, R5 huge
logits (300, and 100,000), R6 tiny, R7 an outlier channel.

Knows: scenes, which slots a step may look at. Does not know: what is right, any backend.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.steps import Scene, Shape

Numbers = NDArray[Any]
Random = np.random.Generator

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
"""Finite numbers of the short dtypes."""

UNUSED, CACHED, NEW = 0, 1, 2
"""What a slot is to a step: nothing it may look at, read, written."""


def random(seed: int, case: str) -> Random:
    """All that a case draws follows from its seed and its id."""
    return np.random.default_rng([seed, zlib.crc32(case.encode())])


@dataclass(frozen=True)
class Layout:
    """Where the rows of a step stand."""

    shape: Shape
    state_rows: Numbers
    cached: Numbers
    query: Numbers
    tables: Numbers
    """[n, M]"""
    use: Numbers
    """[num_blocks, BT] UNUSED | CACHED | NEW"""

    @property
    def num_tokens(self) -> int:
        return int(self.query.sum())

    @property
    def seq_lens(self) -> Numbers:
        return self.cached + self.query


def lay_out(
    shape: Shape,
    rng: Random,
    rows: Sequence[tuple[int, int]],
    *,
    share: bool = False,
    stale: bool = True,
) -> Layout:
    """Rows (cached, query) in the order of the step.

    share: the second of two rows that can reads its prefix from the first one's blocks. stale:
    cells that no query needs name blocks of others; else they are 0.
    """
    size, n = shape.block_tokens, len(rows)
    cached = np.array([row[0] for row in rows], np.int64)
    query = np.array([row[1] for row in rows], np.int64)
    need = -(-(cached + query) // size)
    ids = rng.permutation(np.arange(1, shape.num_blocks))
    last = int(np.flatnonzero(ids == shape.num_blocks - 1)[0])
    ids[[0, last]] = ids[[last, 0]]  # the last id is always somebody's
    tables = np.zeros((n, shape.width), np.int32)
    if stale:
        tables[:] = rng.integers(0, shape.num_blocks, tables.shape)
    taken = 0
    for i in range(n):
        tables[i, : need[i]] = ids[taken : taken + need[i]]
        taken += int(need[i])
    if taken > len(ids):
        raise AssertionError(f"{taken} blocks are needed, the pool has {len(ids)}")
    if share:
        _share_prefix(tables, cached, size)
    use = np.full((shape.num_blocks, size), UNUSED)
    columns = [first_column(shape, int(count)) for count in cached]
    for i, column in enumerate(columns):
        tables[i, :column] = rng.integers(0, shape.num_blocks, column) if stale else 0
    for i, column in enumerate(columns):
        length = int(cached[i] + query[i])
        for begin, end, what in ((column * size, cached[i], CACHED), (cached[i], length, NEW)):
            j = np.arange(begin, end)
            use[tables[i][j // size], j % size] = what
    state_rows = rng.permutation(shape.rows_for_life)[:n].astype(np.int64)
    return Layout(shape, state_rows, cached, query, tables, use)


def first_column(shape: Shape, cached: int) -> int:
    """The first block that a query of the row sees: those before it have left the window, while
    its own slots behind the window still hold the sequence's numbers."""
    if shape.window is None:
        return 0
    return max(0, cached - shape.window + 1) // shape.block_tokens


def _share_prefix(tables: Numbers, cached: Numbers, size: int) -> None:
    """The two rows with the longest prefixes, so that both need the shared blocks."""
    if len(cached) < 2:
        return
    a, b = (int(i) for i in np.argsort(-cached, kind="stable")[:2])
    whole = int(min(cached[a], cached[b])) // size
    tables[b, :whole] = tables[a, :whole]


# ---------------------------------------------------------------- regimes


@dataclass(frozen=True)
class Regime:
    """How q, k and v are made of normal numbers of size 1."""

    spread: float = 1.5
    """Standard deviation of the scores that a query gives to the keys."""
    common: float = 0.0
    """What all scores of a query have in common, with either sign."""
    tiny: bool = False
    outlier: bool = False
    uneven: bool = False
    """Tokens of a head differ by powers of two; some are zeros, and one is far larger than all."""


REGIMES = {
    "normal": Regime(),
    "peaked": Regime(spread=9.0),
    "flat": Regime(spread=0.0),
    "huge": Regime(spread=2.0, common=300.0),
    "vast": Regime(spread=2.0, common=1e5),
    "tiny": Regime(tiny=True),
    "outlier": Regime(outlier=True),
    "uneven": Regime(uneven=True),
}


def fill(
    layout: Layout,
    rng: Random,
    regime: Regime,
    rounded: Callable[[Numbers], Numbers],
    dtype: str,
) -> Scene:
    """A scene of the layout whose every slot, live or not, is drawn from the regime."""
    shape = layout.shape
    lead = (shape.num_blocks, shape.layers, shape.block_tokens)
    dim_v = shape.dim_v or shape.dim
    heads, dim, t = shape.num_kv_heads, shape.dim, layout.num_tokens
    keys, k = rng.normal(size=(*lead, heads, dim)), rng.normal(size=(t, heads, dim))
    values, v = rng.normal(size=(*lead, heads, dim_v)), rng.normal(size=(t, heads, dim_v))
    q = rng.normal(size=(t, shape.num_q_heads, dim))
    if regime.common:
        common = regime.common
        if dtype == "float16":  # products may be held in it, before they meet the scale
            common = min(common, LARGEST[dtype] / 2 * abs(shape.scale))
        main = rng.choice((-1.0, 1.0), (heads, dim))
        small = regime.spread * np.sqrt(dim) / common
        keys, k = main + small * keys, main + small * k
        sign = rng.choice((-1.0, 1.0), (shape.num_q_heads, 1))
        size = common / (dim * abs(shape.scale))
        q = size * (sign * np.repeat(main, shape.queries_per_kv, 0) + 0.02 * q)
    else:
        q *= regime.spread / (abs(shape.scale) * np.sqrt(dim))
    if regime.tiny:
        little, less = (2.0**-12, 1.0) if dtype == "float16" else (2.0**-66, 2.0**-100)
        q, keys, k = little * q, little * keys, little * k
        values, v = less * values, less * v
    if regime.outlier:
        channel, other = rng.integers(dim), rng.integers(dim_v)
        for x in (keys, k):
            x[..., channel] *= 1000
        q[..., channel] /= 1000
        for x in (values, v):
            x[..., other] *= 1000
    if regime.uneven:
        for x, lowest in ((keys, -4), (k, -4), (values, -9), (v, -9)):
            _make_uneven(rng, x, lowest)
    sinks = rounded(draw_sinks(rng, shape)) if shape.sinks else None
    return Scene(
        shape,
        layout.state_rows,
        layout.cached,
        layout.query,
        layout.tables,
        rounded(keys),
        rounded(values),
        rounded(q),
        rounded(k),
        rounded(v),
        sinks=sinks,
    )


def _make_uneven(rng: Random, x: Numbers, lowest: int) -> None:
    """x [..., heads, dim] in place; the large ones are few, as scores that single out a token would
    hide all others."""
    size = 2.0 ** rng.integers(lowest, 1, x.shape[:-1])
    size *= np.where(rng.random(size.shape) < 0.03, 4.0 if lowest > -8 else 300.0, 1.0)
    size *= rng.random(size.shape) >= 0.05
    x *= size[..., None]


def draw_sinks(rng: Random, shape: Shape) -> Numbers:
    """[Hq]: about the size of an lse, but for one that takes all and one that takes nothing."""
    sinks = rng.normal(2.0, 2.0, shape.num_q_heads)
    places = rng.permutation(shape.num_q_heads)[:3]
    for place, value in zip(places, (25.0, -10_000.0, -30.0)):
        sinks[place] = value
    return sinks


def poisoned(
    scene: Scene,
    layout: Layout,
    rng: Random,
    value: float | None,
    rounded: Callable[[Numbers], Numbers],
) -> Scene:
    """The same step with other bytes in all that it must not look at.

    value: what stands in unused slots, other layers and padding tokens; None: another request's
    live numbers. Cells past the end and behind the window name other blocks than before.
    """
    shape, size = scene.shape, scene.shape.block_tokens
    keys, values = scene.keys.copy(), scene.values.copy()
    unused = layout.use != CACHED  # what the step writes is stale before it
    for x in (keys, values):
        other = rounded(rng.normal(size=x.shape) * 3) if value is None else np.full(x.shape, value)
        if value is not None and np.isinf(value):
            other = other * rng.choice((-1.0, 1.0), x.shape)
        for layer in range(shape.layers):
            place = unused if layer == shape.layer else np.ones_like(unused)
            x[:, layer][place] = other[:, layer][place]
    tables = scene.tables.copy()
    live = np.unique(scene.tables)
    for i in range(len(scene.query)):
        first = first_column(shape, int(scene.cached[i]))
        need = -(-int(scene.seq_lens[i]) // size)
        dead = np.ones(shape.width, bool)
        dead[first:need] = False
        choice = live if value is None else np.arange(shape.num_blocks)
        tables[i, dead] = rng.choice(choice, int(dead.sum()))
    padding = 7.0 if value is None else value
    return replace(scene, keys=keys, values=values, tables=tables, padding=padding)
