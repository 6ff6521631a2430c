"""Cases: a KV cache of 8 bits that the backend itself has written, in steps before this one.

Prompts come in chunks and go on token by token, several beside each other; what was never written
holds no number. Blocks move between two steps, with their scales.

Knows: sequences, how steps are cut. Does not know: how a step is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.attention_shapes import INT8, batches, recipe_of, shape_of
from vllm_core_conformance.cases.quantised_kv_check import verify_in_codes
from vllm_core_conformance.inputs import REGIMES, Random, fill, lay_out, random
from vllm_core_conformance.steps import Scene, Stage
from vllm_core_conformance.target import Target, calling

Numbers = NDArray[Any]
Step = list[tuple[int, int, int]]
"""(sequence, cached, query)"""

LARGEST_CHUNK = 40


def _steps(target: Target, seed: int, *, recipe: str, moves: bool) -> Evidence:
    rng, evidence = random(seed, f"quantised.kv.steps.{recipe}"), Evidence()
    shape = shape_of(target, INT8 + recipe)
    size, odd = shape.block_tokens, int(rng.integers(1, 9))
    lengths = [2 * size + odd, size + 1, 70 + odd, min(3 * size, 90), 5]
    layout = lay_out(shape, rng, [(0, length) for length in lengths], stale=False)
    scene = fill(layout, rng, REGIMES["uneven"], target.round, target.dtype)
    for x in (scene.keys, scene.values):
        x[:] = np.nan
    stage = Stage(target, shape)
    stage.write_cache(scene)
    for at, step in enumerate(_cut(target, rng, lengths)):
        part = _part(scene, step)
        seen = stage.play(part)
        evidence += verify_in_codes(target, part, seen, f"step {at} over what steps have written")
        scene.keys, scene.values = seen.keys, seen.values
        if moves and at % 3 == 1:
            _copy(target, rng, stage, scene)
        if moves and at % 4 == 2:
            stage = _moved(target, stage)
    return evidence


def _cut(target: Target, rng: Random, lengths: list[int]) -> Iterator[Step]:
    """Steps until all is computed; the last three tokens of each sequence one by one."""
    limits, done = target.constraints(), [0] * len(lengths)
    multiple = limits.chunk_multiple
    most = max(multiple, min(LARGEST_CHUNK, limits.max_tokens or LARGEST_CHUNK))
    while any(a < b for a, b in zip(done, lengths)):
        wanted: Step = []
        for i, length in enumerate(lengths):
            left = length - done[i]
            if left == 0 or rng.random() < 0.25:
                continue
            chunk = min(multiple * int(rng.integers(1, most // multiple + 1)), left - 3)
            chunk -= chunk % multiple
            wanted.append((i, done[i], max(1, chunk)))
        for rows in batches(target, [row[1:] for row in wanted]) if wanted else ():
            step = [_take(wanted, row) for row in rows]
            yield step
            for i, _, query in step:
                done[i] += query


def _take(wanted: Step, row: tuple[int, int]) -> tuple[int, int, int]:
    return wanted.pop([w[1:] for w in wanted].index(row))


def _part(scene: Scene, step: Step) -> Scene:
    """Of the scene with whole sequences, the tokens of one step."""
    rows = [i for i, _, _ in step]
    tokens = np.concatenate(
        [scene.starts[i] + np.arange(cached, cached + query) for i, cached, query in step]
    )
    return replace(
        scene,
        state_rows=scene.state_rows[rows],
        cached=np.array([cached for _, cached, _ in step]),
        query=np.array([query for _, _, query in step]),
        tables=scene.tables[rows],
        q=scene.q[tokens],
        k=scene.k[tokens],
        v=scene.v[tokens],
        padding=np.nan,
    )


def _copy(target: Target, rng: Random, stage: Stage, scene: Scene) -> None:
    """One sequence goes on in copies of its blocks; the old ones are another's, and no numbers."""
    row = int(rng.integers(len(scene.tables)))
    columns = np.flatnonzero(scene.tables[row])
    src = scene.tables[row, columns].copy()
    spare = np.setdiff1d(np.arange(1, scene.shape.num_blocks), scene.tables)
    dst = rng.choice(spare, len(src), replace=False).astype(np.int32)
    arrays = [target.array(x) for x in (src, dst)]
    attention = target.runtime.attention
    with calling("copy_blocks"):
        stage.kv = attention.copy_blocks(stage.kv, stage.group, *arrays)
    scene.tables[row, columns] = dst
    for x in (scene.keys, scene.values):
        x[dst] = x[src]
        x[src] = np.nan
    blocks = stage.host(scene)
    old = {name: np.ascontiguousarray(x[:, src - 1]) for name, x in blocks.items()}
    with calling("import_blocks"):
        stage.kv = attention.import_blocks(stage.kv, stage.group, [int(i) for i in src], old)


def _moved(target: Target, stage: Stage) -> Stage:
    """A cache of its own with the blocks of this one."""
    attention, new = target.runtime.attention, Stage(target, stage.shape)
    for group in stage.groups:
        ids = list(range(1, stage.shape.num_blocks))[::-1]
        with calling("export_blocks"):
            blocks = attention.export_blocks(stage.kv, group, ids)
        with calling("import_blocks"):
            new.kv = attention.import_blocks(new.kv, group, ids, blocks)
    return new


def _case(what: str, says: str, recipe: str, moves: bool = False) -> Case:
    return Case(
        f"quantised.kv.{what}",
        says,
        partial(_steps, recipe=recipe, moves=moves),
        frozenset({"quantised"}),
        needs=recipe_of(INT8 + recipe).needs,
        every_dtype=True,
    )


CASES: tuple[Case, ...] = (
    _case("steps", "reads back the codes that earlier steps wrote, in chunks or not", "mixed"),
    _case("steps_window", "reads back, under a window, what earlier steps wrote", "window"),
    _case("moved", "goes on over copied and moved blocks, with their scales", "mixed", True),
)
