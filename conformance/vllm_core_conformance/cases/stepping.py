"""Cases: what a step does to rows, tables, history and lengths; all integers, exact.

Knows: lives of rows that hurt. Does not know: any backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.ops_call import rng_of
from vllm_core_conformance.cases.stepping_play import Play, world_of
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling

FAR = 33_280
"""Half of the rows begin behind it: 16 bits do not hold their positions."""
TWO_GROUPS = world_of(length=FAR + 64, width=(FAR + 64) // 4 + 1, far=FAR)
ODD_BLOCKS = world_of(
    num_rows=48,
    rows=40,
    num_slots=30,
    block_tokens=(12, 5, 8),
    width=53,
    length=260,
    tokens=160,
    vocab=300,
    hits=1,
)
TRAFFIC = world_of(
    num_rows=90,
    rows=80,
    num_slots=70,
    num_bias=5,
    width=51,
    length=200,
    tokens=200,
    vocab=70_000,
    hits=8,
    ahead=512,
)
LONG = world_of(
    num_rows=3,
    rows=3,
    num_slots=1,
    block_tokens=(16,),
    width=8200,
    length=131_072,
    tokens=16,
    far=131_008,
    far_every=1,
)
STEPS = 12


def lives(target: Target, seed: int) -> Evidence:
    play = Play(target, TWO_GROUPS, rng_of("stepping.step.lives", seed))
    for _ in range(STEPS):
        play.step()
    return play.evidence


def odd_blocks(target: Target, seed: int) -> Evidence:
    play = Play(target, ODD_BLOCKS, rng_of("stepping.step.groups", seed))
    for rows in (40, None, None, 38, None):
        play.step(rows=rows)
    return play.evidence


def traffic(target: Target, seed: int) -> Evidence:
    """Steps of up to 80 rows with hundreds of changes: many find no room in the step's own
    buffer."""
    play = Play(target, TRAFFIC, rng_of("stepping.step.traffic", seed))
    for rows in (80, 71, 9, None, 77):
        play.step(rows=rows)
    return play.evidence


def long_rows(target: Target, seed: int) -> Evidence:
    """Positions and slots that neither float32 nor 16 bits hold."""
    play = Play(target, LONG, rng_of("stepping.step.long", seed))
    for rows in (3, 2, 3):
        play.step(rows=rows)
    return play.evidence


def padding(target: Target, seed: int) -> Evidence:
    """Steps of one row, nearly all padding, between steps that fill the bucket."""
    play = Play(target, TRAFFIC, rng_of("stepping.step.padding", seed))
    for rows in (TRAFFIC.rows, 1, TRAFFIC.rows, 1, 1):
        play.step(rows=rows)
    return play.evidence


def apply_alone(target: Target, seed: int) -> Evidence:
    """Cells and history tokens go where they are told, in several calls; padding goes to scrap."""
    rng = rng_of("stepping.apply.cells", seed)
    play = Play(target, TRAFFIC, rng)
    world = TRAFFIC
    for count in (1, 511, 1200):
        cells = []
        for _ in world.block_tokens:
            places = rng.permutation(world.num_rows * world.width)[:count]
            rows, columns = np.divmod(places, world.width)
            blocks = rng.integers(0, 2**31 - 1, len(places))
            cells.append(np.stack((rows, columns, blocks), 1).tolist())
        places = rng.permutation(world.num_slots * world.length)[:count]
        slots, positions = np.divmod(places, world.length)
        told = np.stack((slots, positions, rng.integers(0, world.vocab, count)), 1).tolist()
        play.apply(cells, told)
        play.compare_state()
    return play.evidence


def tables(target: Target, seed: int) -> Evidence:
    """alloc, apply and lookup of the block tables by themselves."""
    rng, evidence = rng_of("stepping.tables.lookup", seed), Evidence()
    tables, num_rows, widths = target.runtime.block_tables, 5, (7, 1, 33)
    with calling("block_tables.alloc"):
        device = tables.alloc(num_rows, widths)
    want = [np.zeros((num_rows + 1, width), np.int64) for width in widths]
    changes = []
    for group, width in enumerate(widths):
        places = rng.permutation(num_rows * width)[:12]
        cells = np.stack((*np.divmod(places, width), rng.integers(1, 2**31, len(places))), 1)
        want[group][cells[:, 0], cells[:, 1]] = cells[:, 2]
        padded = np.tile([num_rows, 0, 0], (16, 1))
        padded[: len(cells)] = cells
        changes.append(rng.permutation(padded).astype(np.int32))
    rows = np.repeat(np.arange(num_rows), 40).astype(np.int32)
    columns = np.tile(np.arange(40), num_rows).astype(np.int32)

    def look(device: Any, rows: Any, columns: Any) -> tuple[Any, ...]:
        found = [tables.lookup(device, group, rows, columns) for group in range(len(widths))]
        return (device, *found)

    def change(device: Any, *changes: Any) -> tuple[Any, ...]:
        return (tables.apply(device, changes),)

    looking = target.compile(("tables look",), look, consumes=(0,), num_results=len(widths))
    changing = target.compile(("tables change",), change, consumes=(0,), num_results=0)
    where = target.array(rows), target.array(columns)
    for turn, expected in (("new", [x * 0 for x in want]), ("changed", want)):
        if turn == "changed":
            arrays = [target.array(x) for x in changes]
            with calling("block_tables.apply"):
                (device,) = changing(device, *arrays)
        with calling("block_tables.lookup"):
            results = looking(device, *where)
        device = results[0]
        found = target.fetch(tuple(results[1:]))
        for group, (out, table) in enumerate(zip(found, expected)):
            last = widths[group] - 1
            exact = table[rows, np.minimum(columns, last)]
            evidence += require_equal(
                np.asarray(out).astype(np.int64).reshape(num_rows, 40),
                exact.reshape(num_rows, 40),
                f"lookup in the {turn} table of group {group}, {last + 1} columns wide "
                "(columns past it read its last cell)",
                axes=("row", "column"),
            )
    return evidence


_CORE = frozenset({"core"})

CASES: tuple[Case, ...] = (
    Case(
        "stepping.step.lives",
        "turns changes into ids, positions, slots and lengths over many steps of random rows",
        lives,
        frozenset({"core", "smoke"}),
    ),
    Case(
        "stepping.step.groups",
        "keeps three groups with blocks of 12, 5 and 8 tokens apart, in steps of 40 rows",
        odd_blocks,
        _CORE,
    ),
    Case(
        "stepping.step.traffic",
        "takes steps of 80 rows and hundreds of changes",
        traffic,
        _CORE,
    ),
    Case(
        "stepping.step.long",
        "computes slots exactly up to position 131,071 and slot 2^31 - 1",
        long_rows,
        _CORE,
    ),
    Case(
        "stepping.step.padding",
        "lets padding change nothing but scrap",
        padding,
        _CORE,
    ),
    Case(
        "stepping.apply.cells",
        "writes table cells and history tokens ahead of a step",
        apply_alone,
        _CORE,
    ),
    Case(
        "stepping.tables.lookup",
        "allocates empty block tables, changes their cells and looks them up",
        tables,
        _CORE,
    ),
)
