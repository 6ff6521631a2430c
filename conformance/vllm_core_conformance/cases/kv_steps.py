"""Cases: the KV cache under steps: what they write, and blocks that moved between two of them.

Knows: scenes, block ids. Does not know: layouts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.attention_check import verify_cache, verify_inputs
from vllm_core_conformance.cases.attention_coded import verify_coded
from vllm_core_conformance.cases.attention_shapes import batches, mixture, shape_of
from vllm_core_conformance.coded import Coded, code
from vllm_core_conformance.inputs import CACHED, LARGEST, REGIMES, fill, lay_out, random
from vllm_core_conformance.oracle.attention import cache_after
from vllm_core_conformance.steps import Scene, Stage
from vllm_core_conformance.target import Target, calling

Numbers = NDArray[Any]

WRITTEN = ("mixed", "mqa", "heads_7", "largest_block", "smallest_block", "window", "narrow")


def _written(target: Target, seed: int) -> Evidence:
    rng, evidence = random(seed, "kv.written"), Evidence()
    for place, name in enumerate(WRITTEN):
        shape = shape_of(target, name)
        if shape.window is not None and not target.caps.windows:
            continue
        for step in batches(target, mixture(target, name, rng)):
            layout = lay_out(shape, rng, step)
            scene = fill(layout, rng, REGIMES["normal"], target.round, target.dtype)
            for x in (scene.k, scene.v):  # what arithmetic would not keep
                x[rng.random(x.shape) < 0.05] = -0.0
                x[rng.random(x.shape) < 0.02] = 2.0**-14
                x[rng.random(x.shape) < 0.02] = -LARGEST["float16"]
                x[:] = target.round(x)
            scene.padding = (np.nan, 7.0)[place % 2]
            scene.exact_shapes = place % 3 == 2
            stage = Stage(target, shape)
            stage.write_cache(scene)
            evidence += _verify(scene, stage)
            evidence += verify_inputs(target, scene, stage)
    return evidence


def _verify(scene: Scene, stage: Stage) -> Evidence:
    seen = stage.play(scene)
    keys, values = cache_after(scene)
    keys[0] = values[0] = 0.0
    return verify_cache(scene, seen, keys, values)


def _chunks(target: Target, seed: int) -> Evidence:
    """One prompt in chunks and then token by token, beside another row: the same cache."""
    rng, evidence = random(seed, "kv.chunks"), Evidence()
    shape = shape_of(target, "mixed")
    multiple = target.constraints().chunk_multiple
    size, odd = shape.block_tokens, 1 + int(rng.integers(shape.block_tokens))
    chunks = [size, odd, 2, 1, 1, 1] if multiple == 1 else [multiple, multiple, 1, 1, 1]
    total = sum(chunks)
    whole = lay_out(shape, rng, [(0, total)])
    scene = fill(whole, rng, REGIMES["normal"], target.round, target.dtype)
    stage = Stage(target, shape)
    stage.write_cache(scene)
    keys, values = cache_after(scene)
    keys[0] = values[0] = 0.0
    done = 0
    for count in chunks:
        here = slice(done, done + count)
        part = replace(
            scene,
            cached=np.array([done]),
            query=np.array([count]),
            q=scene.q[here],
            k=scene.k[here],
            v=scene.v[here],
            padding=np.nan,
        )
        seen = stage.play(part)
        done += count
    evidence += verify_cache(scene, seen, keys, values)
    return evidence


def _copied(target: Target, seed: int) -> Evidence:
    """Blocks that queries need come from a copy, as when a shared block is about to be written."""
    rng, evidence = random(seed, "kv.copied"), Evidence()
    shape = shape_of(target, "mixed")
    for step in batches(target, mixture(target, "mixed", rng)):
        layout = lay_out(shape, rng, step)
        coded = code(layout, rng)
        needed = np.flatnonzero((layout.use == CACHED).any(1))
        spare = np.flatnonzero((layout.use == 0).all(1) & (np.arange(shape.num_blocks) > 0))
        count = min(len(needed), len(spare), 6)
        if count == 0:
            continue
        dst, src = (rng.choice(x, count, replace=False) for x in (needed, spare))
        keys, values = coded.scene.keys, coded.scene.values
        before = replace(
            coded.scene, keys=_swapped(keys, src, dst), values=_swapped(values, src, dst)
        )
        after = replace(coded.scene, keys=_put(keys, src, dst), values=_put(values, src, dst))
        stage = Stage(target, shape)
        stage.write_cache(before)
        padded = [np.concatenate((x, np.zeros(8 - count))).astype(np.int32) for x in (src, dst)]
        arrays = [target.array(x) for x in padded]
        with calling("copy_blocks"):
            stage.kv = target.runtime.attention.copy_blocks(stage.kv, stage.group, *arrays)
        evidence += verify_coded(replace(coded, scene=after), stage.play(after))
    return evidence


def _swapped(x: Numbers, src: Numbers, dst: Numbers) -> Numbers:
    """What dst must get stands at src."""
    new = x.copy()
    new[src], new[dst] = x[dst], x[src]
    return new


def _put(x: Numbers, src: Numbers, dst: Numbers) -> Numbers:
    """After the copy both hold it."""
    new = x.copy()
    new[src] = x[dst]
    return new


def _moved(target: Target, seed: int) -> Evidence:
    """A cache goes through the host into another one, under other block ids."""
    rng, evidence = random(seed, "kv.moved"), Evidence()
    shape = shape_of(target, "mixed")
    for step in batches(target, mixture(target, "mixed", rng)):
        coded = code(lay_out(shape, rng, step), rng)
        scene, attention = coded.scene, target.runtime.attention
        old, new = Stage(target, shape), Stage(target, shape)
        old.write_cache(scene)
        ids = [int(i) for i in rng.permutation(np.arange(1, shape.num_blocks))]
        named = np.concatenate(([0], 1 + rng.permutation(shape.num_blocks - 1)))
        with calling("export_blocks"):
            found = attention.export_blocks(old.kv, old.group, ids)
        with calling("import_blocks"):
            new.kv = attention.import_blocks(new.kv, new.group, [int(named[i]) for i in ids], found)
        moved = _renamed(coded, named)
        evidence += verify_coded(moved, new.play(moved.scene))
    return evidence


def _renamed(coded: Coded, named: Numbers) -> Coded:
    """The same with block i called named[i]."""
    scene = coded.scene
    keys, values, after = (np.empty_like(x) for x in (scene.keys, scene.values, coded.after))
    keys[named], values[named], after[named] = scene.keys, scene.values, coded.after
    tables = named[scene.tables].astype(np.int32)
    return replace(
        coded, scene=replace(scene, keys=keys, values=values, tables=tables), after=after
    )


CASES: tuple[Case, ...] = (
    Case(
        "kv.written",
        "a step writes K and V of its tokens at their slots, in its layer, and nothing else",
        _written,
        frozenset({"core", "smoke"}),
        every_dtype=True,
    ),
    Case(
        "kv.chunks",
        "chunks and single tokens leave the cache of one whole prompt",
        _chunks,
        frozenset({"core"}),
        every_dtype=True,
    ),
    Case(
        "kv.copied",
        "queries find in a copied block what its source held",
        _copied,
        frozenset({"core"}),
        every_dtype=True,
    ),
    Case(
        "kv.moved",
        "blocks that went through the host into another cache answer as before",
        _moved,
        frozenset({"core"}),
        every_dtype=True,
    ),
)
