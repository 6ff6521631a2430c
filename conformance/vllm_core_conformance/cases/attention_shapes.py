"""The static shapes that the attention cases share, and rows of awkward lengths for each.

Few, because a device of static shapes compiles a program for each; lengths, ids and numbers vary by
seed inside them. Block sizes come from the backend: its preferred, smallest and largest.

Knows: shapes, lengths, declared limits of a step. Does not know: numbers, what is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from vllm_core.backend import StepConstraints
from vllm_core_conformance.inputs import Random
from vllm_core_conformance.steps import Shape
from vllm_core_conformance.target import Target

MAX_BLOCK = 128
"""Larger blocks make scenes slow, and find nothing more."""

Rows = list[tuple[int, int]]
"""(cached, query) of each row."""


@dataclass(frozen=True)
class Recipe:
    """A Shape but for its block size."""

    heads: tuple[int, int]
    dim: int
    scale: float
    tokens: int
    """T"""
    rows: int
    """S"""
    longest: int
    """Tokens of the longest sequence, beside `longest_blocks` blocks."""
    total: int
    """Tokens of all sequences, beside `rows` blocks."""
    longest_blocks: int = 3
    block: str = "preferred"
    window: tuple[int, int] | None = None
    """(blocks, tokens): their sum."""
    softcap: float | None = None
    sinks: bool = False
    lse: bool = False
    causal: bool = True
    decoy_group: bool = False
    share_pool: bool = False
    fused: bool = False
    num_rows: int = 0
    layers: int = 3
    layer: int = 1
    dim_v: int | None = None
    int8: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Capabilities that the shape takes; the lse is left out where it is not declared."""
        wanted = {
            "windows": self.window is not None,
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            f"head_dim:{self.dim}": self.dim > 128,
            "kv:int8": self.int8,
        }
        return tuple(name for name, is_needed in wanted.items() if is_needed)


RECIPES = {
    "mixed": Recipe((6, 2), 64, 0.1, 256, 12, 200, 640, lse=True, decoy_group=True),
    "decode": Recipe((10, 2), 128, 0.07, 140, 140, 260, 4200, num_rows=160, layers=2),
    "mqa": Recipe((20, 1), 80, 0.15, 96, 8, 100, 400, fused=True),
    "heads_7": Recipe((7, 1), 96, 0.08, 96, 8, 100, 400, layers=2, layer=0),
    "largest_block": Recipe(
        (14, 2), 48, 0.19, 96, 8, 100, 400, block="largest", share_pool=True, lse=True
    ),
    "smallest_block": Recipe(
        (9, 3), 16, 0.3, 64, 10, 44, 280, longest_blocks=2, block="smallest", layers=2, fused=True
    ),
    "window": Recipe(
        (10, 2), 64, 0.11, 160, 10, 150, 560, window=(1, 5), lse=True, decoy_group=True
    ),
    "window_short": Recipe((12, 3), 64, 0.09, 64, 8, 90, 300, window=(0, 3), layers=2),
    "window_sinks": Recipe((12, 1), 64, 0.12, 64, 8, 150, 600, 7, window=(4, 3), sinks=True),
    "sinks": Recipe((16, 2), 72, 0.13, 64, 8, 90, 360, sinks=True, fused=True),
    "softcap": Recipe((12, 2), 96, 0.2, 96, 8, 100, 400, softcap=7.5, lse=True),
    "softcap_window": Recipe(
        (3, 3), 256, 0.05, 64, 8, 90, 320, 4, window=(2, 7), softcap=7.5, layers=2
    ),
    "prefill": Recipe((4, 2), 32, 0.21, 400, 4, 520, 1300, layers=2),
    "narrow": Recipe((6, 2), 2, 0.6, 32, 6, 60, 200, layers=2),
    "long": Recipe((4, 1), 64, 0.1, 16, 4, 5100, 11_000, lse=True, layers=1, layer=0),
    "very_long": Recipe(
        (2, 1), 64, 0.1, 4, 2, 33_200, 33_600, block="largest", layers=1, layer=0, lse=True
    ),
    "narrow_values": Recipe((4, 2), 64, 0.1, 32, 4, 60, 200, dim_v=32, layers=2),
}


INT8 = "int8 "
"""Before the name of a recipe: the same over a cache of 8 bits."""


def recipe_of(name: str) -> Recipe:
    plain = RECIPES[name.removeprefix(INT8)]
    return replace(plain, int8=True) if name.startswith(INT8) else plain


def shape_of(target: Target, name: str) -> Shape:
    """The Shape of a recipe on this backend, made once."""
    found = target.memo.get(("attention shape", name))
    if found is None:
        found = target.memo["attention shape", name] = _make(target, recipe_of(name))
    shape: Shape = found
    return shape


def _make(target: Target, recipe: Recipe) -> Shape:
    draft = _shape(target, recipe, 16)
    offers = target.block_tokens(draft.spec(target.dtype))
    sizes = [size for size in offers if size <= MAX_BLOCK] or [min(offers)]
    size = {"preferred": sizes[0], "smallest": min(sizes), "largest": max(sizes)}[recipe.block]
    return _shape(target, recipe, size)


def _shape(target: Target, recipe: Recipe, size: int) -> Shape:
    window = None
    if recipe.window is not None:
        blocks, tokens = recipe.window
        window = blocks * size + tokens
    most = target.constraints().max_tokens
    return Shape(
        num_q_heads=recipe.heads[0],
        num_kv_heads=recipe.heads[1],
        dim=recipe.dim,
        block_tokens=size,
        num_blocks=ceil(recipe.total / size) + 2 * recipe.rows + 6,
        tokens=min(recipe.tokens, most or recipe.tokens),
        rows=recipe.rows,
        width=ceil(recipe.longest / size) + recipe.longest_blocks + 2,
        scale=recipe.scale,
        window=window,
        softcap=recipe.softcap,
        causal=recipe.causal,
        sinks=recipe.sinks,
        return_lse=recipe.lse and target.caps.return_lse,
        num_rows=recipe.num_rows,
        layers=recipe.layers,
        layer=recipe.layer,
        decoy_group=recipe.decoy_group or recipe.share_pool,
        share_pool=recipe.share_pool,
        fused=recipe.fused,
        dim_v=recipe.dim_v,
        int8=recipe.int8,
    )


# ---------------------------------------------------------------- lengths
def edges(size: int) -> list[int]:
    """Lengths at which blocks and usual tiles end."""
    own = [size, size + 1, size - 1, 2 * size, 2 * size + 1, 2 * size - 1, 3 * size + size // 2]
    tiles = [32, 33, 31, 64, 65, 63, 128, 129, 127, 256, 257, 255, 512, 513, 511]
    return list(dict.fromkeys(x for x in (1, 2, *own, *tiles) if x > 0))


def decoding(target: Target, name: str, rng: Random) -> Rows:
    """Rows of one token, of as many awkward lengths as the shape holds, in any order."""
    shape, room = shape_of(target, name), _Room(shape_of(target, name), recipe_of(name))
    for length in edges(shape.block_tokens):
        room.take(length - 1, 1)
    while room.rows and room.take(int(rng.integers(0, min(40, room.longest))), 1):
        pass
    rows = room.taken
    return [rows[i] for i in rng.permutation(len(rows))]


def mixture(target: Target, name: str, rng: Random) -> Rows:
    """Decoding rows, fresh prompts and chunks behind a cached prefix."""
    shape = shape_of(target, name)
    room, size = _Room(shape, recipe_of(name)), shape.block_tokens
    odd = size + 1 + int(rng.integers(0, size))
    wanted = [(size, 1), (0, size + 1), (odd, 2), (size - 1, 1), (size, size), (2 * size + 3, 1)]
    wanted += [(2 * size, 33), (0, 1), (odd + 1, size - 1), (7, 65), (2 * size - 1, 2)]
    if shape.window is not None:
        wanted[1:1] = [(shape.window + size + 1, 1), (shape.window, 2)]
    for cached, query in wanted:
        room.take(cached, query)
    while room.rows and room.tokens > 2:
        if not room.take(int(rng.integers(0, 2 * size + 2)), int(rng.integers(1, 6))):
            break
    rows = room.taken
    return [rows[i] for i in rng.permutation(len(rows))]


class _Room:
    """What is still free in a shape."""

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        self.tokens, self.rows = shape.tokens, shape.rows
        self.longest = recipe.longest + recipe.longest_blocks * shape.block_tokens
        self.blocks = shape.num_blocks - 5
        self.size = shape.block_tokens
        self.taken: Rows = []

    def take(self, cached: int, query: int) -> bool:
        """The row, if it fits and is one."""
        blocks = ceil((cached + query) / self.size)
        fits = query <= self.tokens and self.rows > 0 and blocks <= self.blocks
        if cached < 0 or query < 1 or cached + query > self.longest or not fits:
            return False
        self.taken.append((cached, query))
        self.tokens, self.rows, self.blocks = (
            self.tokens - query,
            self.rows - 1,
            self.blocks - blocks,
        )
        return True


def batches(target: Target, rows: Sequence[tuple[int, int]]) -> list[Rows]:
    """The rows as steps that the declared limits allow, rows of one token first in each."""
    limits = target.constraints()
    rows = [_allowed(row, limits) for row in rows]
    steps: list[Rows] = [[]]
    for row in sorted(rows, key=lambda row: row[1] > 1):
        if steps[-1] and not _fits([*steps[-1], row], limits):
            steps.append([])
        steps[-1].append(row)
    return steps


def _allowed(row: tuple[int, int], limits: StepConstraints) -> tuple[int, int]:
    cached, query = row
    query = min(query, limits.max_tokens or query)
    if query > 1:  # what is cached came in whole chunks
        cached -= cached % limits.chunk_multiple
    return cached, query


def _fits(rows: Rows, limits: StepConstraints) -> bool:
    queries = np.array([query for _, query in rows])
    num_prefills = int((queries > 1).sum())
    if limits.max_tokens is not None and queries.sum() > limits.max_tokens:
        return False
    if limits.max_prefills is not None and num_prefills > limits.max_prefills:
        return False
    return limits.mixed_ok or num_prefills in (0, len(rows))
