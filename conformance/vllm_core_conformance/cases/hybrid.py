"""Cases: layers of many kinds in one step, heads of every shape, long prompts and rows of every
kind, every block size, and pools of many blocks.

Knows: which kinds stand side by side, which lengths. Does not know: how they are played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vllm_core.errors import NotSupported
from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.attention_shapes import MAX_BLOCK, Rows, batches
from vllm_core_conformance.cases.hybrid_step import HybridStage, Kind, Model
from vllm_core_conformance.inputs import Random, random
from vllm_core_conformance.target import Raised, Target

MANY_BLOCKS = 70_001
"""Ids that 16 bits do not hold."""
MANY_BYTES = 96 << 20


def _size(target: Target, model: Model, *, smallest: bool = False) -> int:
    """The preferred block size, or the smallest."""
    spec = model.shape(model.kinds[0]).spec(target.dtype)
    offers = target.block_tokens(spec)
    sizes = [size for size in offers if size <= MAX_BLOCK] or [min(offers)]
    return min(sizes) if smallest else sizes[0]


def _fitting(target: Target, model: Model) -> Model:
    """Not more tokens in a step than the backend takes."""
    most = target.constraints().max_tokens or model.tokens
    return replace(model, tokens=min(model.tokens, most)).allowed(target)


def _play(target: Target, model: Model, rng: Random, says: str, *steps: Rows) -> Evidence:
    """Steps on one cache, each as many as the device's limits make of it."""
    evidence, stage = Evidence(), HybridStage(target, model, rng)
    for rows in steps:
        for step in batches(target, rows):
            evidence += stage.verify_all(step, says)
    return evidence


# ---------------------------------------------------------------- kinds side by side
def _model(target: Target) -> Model:
    """Full layers that differ in scale, softcap and sinks; windows of whole blocks and one off, of
    a usual tile, of one token, and longer than every row."""
    draft = Model("layers", (Kind(),), (6, 2), 32, 16, 128, 12, 420, 1300)
    size = _size(target, draft)
    kinds = (
        Kind(0.12, lse=True),
        Kind(0.3),
        Kind(0.12, window=2 * size, lse=True),
        Kind(0.2, softcap=5.0, sinks=True),
        Kind(0.12, window=size),
        Kind(0.12, softcap=3.0, lse=True, regime="peaked"),
        Kind(0.17, window=2 * size, softcap=4.0, sinks=True, regime="peaked"),
        Kind(0.12, sinks=True),
        Kind(0.12, window=2 * size + 1),
        Kind(0.15, window=64 if size < 64 else 48, lse=True),
        Kind(0.12, window=4096, sinks=True),
        Kind(0.12, window=size, sinks=True),
        Kind(0.12, window=1),
    )
    return _fitting(target, replace(draft, kinds=kinds, block_tokens=size))


def _rows(model: Model, rng: Random) -> Rows:
    """Rows that end where blocks, windows and tiles end, the shortest first; two are many windows
    long."""
    size, some = model.block_tokens, int(rng.integers(0, 9))
    wanted = [(390 + some, 1), (2 * size - 1, 1), (300 + some, 5), (2 * size, 1), (63, 1)]
    wanted += [(size - 1, 1), (2 * size - 3, size + 2), (64, 1), (0, 1), (0, 2 * size + 1)]
    wanted += [(3 * size, 3), (size, 1)]
    taken: Rows = []
    tokens, total = model.tokens, model.total
    for cached, query in wanted[: model.rows]:
        if cached + query <= model.longest and query <= tokens and cached + query <= total:
            taken.append((cached, query))
            tokens, total = tokens - query, total - cached - query
    return sorted(taken, key=sum)


def _layers(target: Target, seed: int) -> Evidence:
    rng, model = random(seed, "attention.hybrid.layers"), _model(target)
    few = [(380 + int(rng.integers(20)), 1), (3, 1), (model.block_tokens, 1)]
    return _play(target, model, rng, "layers of many kinds", _rows(model, rng), few)


def _decode(target: Target, seed: int) -> Evidence:
    """One token each, at every length around the ends of windows and blocks, the longest first:
    what only the first row needs is not what the others need."""
    rng, model = random(seed, "attention.hybrid.decode"), _model(target)
    size = model.block_tokens
    lengths = [1, size, size + 1, 2 * size, 2 * size + 1, 2 * size + 2, 3 * size, 4 * size + 1]
    lengths += [5 * size + int(rng.integers(size)), 64, 65, 400 + int(rng.integers(20))]
    lengths = sorted((x for x in lengths if x <= model.longest), reverse=True)
    while sum(lengths) > model.total:
        lengths.pop()
    rows = [(length - 1, 1) for length in lengths]
    few = [(2, 1), (model.block_tokens, 1), (380 + int(rng.integers(20)), 1)]
    return _play(target, model, rng, "decoding through layers of many kinds", rows, few)


def _no_mask(target: Target, rng: Random, *, behind: bool) -> Evidence:
    """Not among what the seam calls mandatory: it may be refused, and must not be wrong."""
    draft = Model("no mask", (Kind(),), (6, 2), 48, 16, 96, 6, 150, 500, causal=False)
    size = _size(target, draft)
    kinds = (
        Kind(0.12),
        Kind(0.12, window=size // 2 + 3),
        Kind(0.2, softcap=5.0),
        Kind(0.12, window=size // 2 + 3, sinks=True),
        Kind(0.15, lse=True),
    )
    model = _fitting(target, replace(draft, kinds=kinds, block_tokens=size))
    some = int(rng.integers(0, 5))
    rows = [(0, 29 + some), (0, size // 2 + 5), (0, 1), (0, 7 + some)]
    if behind:
        chunk = min(size, 24)
        rows = [(size + some, 1), (size, chunk // 2 + 7), (11, chunk + 3), (size // 2, 9 + some)]
    try:
        return _play(target, model, rng, "layers without a causal mask", rows)
    except Raised as raised:
        if isinstance(raised.error, NotSupported):
            return Evidence(checks=1, notes=["without a causal mask: refused with NotSupported"])
        raise


def _prompts_without_mask(target: Target, seed: int) -> Evidence:
    return _no_mask(target, random(seed, "attention.hybrid.no_mask"), behind=False)


def _chunks_without_mask(target: Target, seed: int) -> Evidence:
    return _no_mask(target, random(seed, "attention.hybrid.no_mask_behind"), behind=True)


# ---------------------------------------------------------------- heads
HEADS = (
    ((32, 8), 128),
    ((16, 16), 64),
    ((32, 1), 64),
    ((64, 4), 32),
    ((9, 9), 120),
    ((20, 2), 112),
    ((8, 1), 160),
    ((6, 3), 192),
    ((4, 2), 256),
    ((36, 9), 40),
)
"""(query heads, KV heads), dim: of real models, and what lies between."""


def _heads_model(target: Target) -> Model:
    draft = Model("heads", (Kind(),), (4, 4), 64, 16, 48, 6, 100, 300, spare_layers=8)
    kinds = [Kind(0.7 / dim**0.5, heads=heads, dim=dim) for heads, dim in HEADS]
    kinds += [Kind(0.02), Kind(1.7, lse=True)]
    return _fitting(target, replace(draft, kinds=tuple(kinds), block_tokens=_size(target, draft)))


def _heads_decode(target: Target, seed: int) -> Evidence:
    rng, model = random(seed, "attention.hybrid.heads"), _heads_model(target)
    rows = [(int(cached), 1) for cached in rng.choice(70, 4, replace=False)]
    return _play(target, model, rng, "decoding with heads of every shape", rows)


def _heads_prompts(target: Target, seed: int) -> Evidence:
    rng, model = random(seed, "attention.hybrid.heads_prompts"), _heads_model(target)
    rows = [(0, 17 + int(rng.integers(4))), (40 + int(rng.integers(20)), 6), (9, 4), (21, 8)]
    return _play(target, model, rng, "chunks with heads of every shape", rows)


# ---------------------------------------------------------------- long
def _prompts(target: Target, rng: Random, rows: Rows) -> Evidence:
    """Chunks of many tiles, and windows that bite within one."""
    draft = Model("prompts", (Kind(),), (4, 2), 32, 16, 400, 3, 560, 640)
    size = _size(target, draft)
    kinds = (
        Kind(0.07, dim=128),
        Kind(0.2, window=size + 5),
        Kind(0.2, window=150, sinks=True),
        Kind(0.25, softcap=6.0, lse=True),
        Kind(0.2, sinks=True),
    )
    model = _fitting(target, replace(draft, kinds=kinds, block_tokens=size))
    return _play(target, model, rng, "long chunks through layers of many kinds", rows)


def _fresh_prompt(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.hybrid.prompts")
    return _prompts(target, rng, [(30, 1), (0, 389 + int(rng.integers(10)))])


def _behind_prefix(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.hybrid.prompts_behind")
    return _prompts(target, rng, [(129 + int(rng.integers(9)), 386), (0, 13)])


def _long(target: Target, rng: Random, rows: Rows) -> Evidence:
    """Rows of thousands, in layers of which each keeps another part of them."""
    draft = Model("long", (Kind(),), (2, 1), 16, 16, 24, 3, 8500, 14_500)
    size = _size(target, draft)
    kinds = (
        Kind(0.2, lse=True),
        Kind(0.3, sinks=True),
        Kind(0.3, softcap=6.0),
        Kind(0.2, window=700, lse=True),
    )
    model = _fitting(target, replace(draft, kinds=kinds, block_tokens=size))
    return _play(target, model, rng, "long rows through layers of many kinds", rows)


def _long_decode(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.hybrid.long")
    return _long(target, rng, [(8300 + int(rng.integers(100)), 1), (640, 1), (5000, 1)])


def _long_chunks(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.hybrid.long_chunks")
    return _long(target, rng, [(900, 1), (8300 + int(rng.integers(100)), 7), (4700, 13)])


# ---------------------------------------------------------------- blocks
def _block_sizes(target: Target, seed: int) -> Evidence:
    """Every size that is offered, with many short prompts in a step; one size where each costs a
    compilation."""
    rng = random(seed, "attention.hybrid.block_sizes")
    draft = Model(
        "block sizes", (Kind(lse=True), Kind(0.2, window=37)), (4, 2), 24, 16, 90, 24, 290, 740
    )
    offers = target.block_tokens(draft.shape(draft.kinds[0]).spec(target.dtype))
    sizes = [int(x) for x in rng.permutation([x for x in offers if x <= 2 * MAX_BLOCK])]
    evidence = Evidence()
    for size in sizes[:1] if target.is_static else sizes:
        model = _fitting(target, replace(draft, block_tokens=size))
        end = int(rng.integers(1, 3)) * size  # a chunk that ends with a block
        rows = [(min(2 * size, 257), 1), (size - 1, 1), (0, 19), (min(end, 250) - 1, 9)]
        rows += [(i % 4, 2 + (size + i) % 3) for i in range(18)]
        evidence += _play(target, model, rng, f"blocks of {size} tokens", rows)
    return evidence


# ---------------------------------------------------------------- many blocks
def _many_blocks(target: Target, rng: Random, rows: Rows) -> Evidence:
    """Ids beyond 32,767 and 65,535, in blocks as small as there are."""
    draft = Model("many blocks", (Kind(),), (2, 1), 4, 16, 16, 6, 60, 220)
    size = _size(target, draft, smallest=True)
    blocks = min(MANY_BLOCKS, MANY_BYTES // (size * 2 * draft.dim * 4))
    model = _fitting(target, replace(draft, block_tokens=size, pool_blocks=blocks))
    return _play(target, model, rng, f"a pool of {blocks} blocks", rows)


def _far_decode(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.hybrid.many_blocks")
    rows = [(int(cached), 1) for cached in rng.choice(55, 5, replace=False)]
    return _many_blocks(target, rng, rows)


def _far_prompts(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.hybrid.many_blocks_prompts")
    return _many_blocks(target, rng, [(40 + int(rng.integers(10)), 2), (17, 3), (0, 7)])


def _case(name: str, says: str, run: Callable[[Target, int], Evidence]) -> Case:
    return Case(f"attention.hybrid.{name}", says, run, frozenset({"core"}), every_dtype=True)


CASES: tuple[Case, ...] = (
    _case(
        "layers",
        "layers that differ in window, scale, softcap and sinks, planned together, are each right",
        _layers,
    ),
    _case(
        "decode",
        "decoding rows are right in windows that end with a block and in those that do not",
        _decode,
    ),
    _case(
        "no_mask",
        "without a causal mask a window still bounds only the past, or is refused",
        _prompts_without_mask,
    ),
    _case(
        "no_mask_behind",
        "without a causal mask, chunks behind a prefix see all that is there, or are refused",
        _chunks_without_mask,
    ),
    _case("heads", "decodes with heads of every number and size", _heads_decode),
    _case("heads_prompts", "chunks with heads of every number and size are right", _heads_prompts),
    _case("prompts", "long prompts are right in every kind of layer", _fresh_prompt),
    _case("prompts_behind", "long chunks behind a prefix are right in every kind", _behind_prefix),
    _case("long", "rows of thousands decode in every kind of layer", _long_decode),
    _case("long_chunks", "chunks behind thousands are right in every kind", _long_chunks),
    _case("block_sizes", "every offered block size is right", _block_sizes),
    _case("many_blocks", "blocks are found whatever their id", _far_decode),
    _case("many_blocks_prompts", "chunks find blocks whatever their id", _far_prompts),
)
