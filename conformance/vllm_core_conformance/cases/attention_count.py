"""Cases: every visible token weighs the same, and V says which were counted (R4).

Queries are 0. On even KV heads V marks the token's position modulo the head's width, on odd ones
its column in the table; so a dropped, extra or doubled token, or block, shows in the counts.

Knows: counts. Does not know: numbers that are nearly right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Case, Evidence, Failed
from vllm_core_conformance.cases.attention_check import query_of, verify
from vllm_core_conformance.cases.attention_shapes import (
    RECIPES,
    Rows,
    batches,
    decoding,
    mixture,
    shape_of,
)
from vllm_core_conformance.inputs import (
    REGIMES,
    Layout,
    Random,
    fill,
    first_column,
    lay_out,
    random,
)
from vllm_core_conformance.steps import Scene, Seen, Stage
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]


def _scene(layout: Layout, rng: Random, target: Target) -> Scene:
    scene = fill(layout, rng, REGIMES["flat"], target.round, target.dtype)
    shape, size = scene.shape, scene.shape.block_tokens
    heads, dim = shape.num_kv_heads, scene.v.shape[-1]
    values = np.eye(dim)[rng.integers(0, dim, scene.values.shape[:-1])]
    v = np.zeros_like(scene.v)
    for row in range(len(layout.query)):
        need = -(-int(layout.seq_lens[row]) // size)
        j = np.arange(need * size)
        if shape.window is not None:
            j = j[j >= first_column(shape, int(layout.cached[row])) * size]
        marks = np.stack([np.eye(dim)[_marks(head, j, size, dim)] for head in range(heads)], 1)
        # what this step writes holds the marks of others before
        before = j < layout.cached[row]
        past = (j >= layout.seq_lens[row]) | before
        values[layout.tables[row][j[past] // size], shape.layer, j[past] % size] = marks[past]
        here = slice(int(scene.starts[row]), int(scene.starts[row + 1]))
        v[here] = marks[(j >= layout.cached[row]) & (j < layout.seq_lens[row])]
    return replace(scene, q=np.zeros_like(scene.q), values=values, v=v)


def _marks(head: int, position: Numbers, size: int, dim: int) -> Numbers:
    return (position if head % 2 == 0 else position // size) % dim


def _count(target: Target, name: str, rng: Random, rows: Rows, *, exact: bool) -> Evidence:
    evidence = Evidence()
    for step in batches(target, rows):
        layout = lay_out(shape_of(target, name), rng, step)
        scene = _scene(layout, rng, target)
        scene.exact_shapes = exact
        stage = Stage(target, scene.shape)
        stage.write_cache(scene)
        seen = stage.play(scene)
        try:
            evidence += verify(target, scene, seen, "equal weights")
        except Failed as failure:
            sentence = _sentence(scene, seen)
            raise Failed(sentence or failure.sentence, **failure.details) from None
    return evidence


def _sentence(scene: Scene, seen: Seen) -> str:
    """Of the first query whose counts are wrong; empty where none is."""
    shape, size = scene.shape, scene.shape.block_tokens
    for token in range(scene.num_tokens):
        row, position = query_of(scene, token)
        first = 0 if shape.window is None else max(0, position - shape.window + 1)
        j = np.arange(first, position + 1)
        for head in range(shape.num_q_heads):
            kv_head = head // shape.queries_per_kv
            marks = _marks(kv_head, j, size, seen.out.shape[-1])
            want = np.bincount(marks, minlength=seen.out.shape[-1])
            found = _counts(seen.out[token, head], len(j))
            if found is None or (found == want).all():
                continue
            mark = int(np.argmax(found != want))
            if kv_head % 2:
                what = (
                    f"column {mark} of its table (tokens {mark * size}..{mark * size + size - 1})"
                )
            else:
                what = f"the tokens whose position is {mark} modulo {len(want)}"
            return (
                f"query {token} head {head} (kv head {kv_head}), token {position} of sequence "
                f"{row}, counted {found.sum()} tokens instead of {len(j)}: of {what} "
                f"{found[mark]} instead of {want[mark]}"
            )
    return ""


def _counts(out: Numbers, expected: int) -> Numbers | None:
    """The counts of which `out` is the fraction, for the total nearest to the expected one."""
    if not np.isfinite(out).all():
        return None
    near = range(max(1, expected - 300), expected + 300)
    for total in sorted(near, key=lambda n: abs(n - expected)):
        counts = out * total
        if np.abs(counts - np.round(counts)).max() < 0.1 and round(float(counts.sum())) == total:
            return np.asarray(np.round(counts).astype(int))
    return None


def _case(name: str, says: str, smoke: bool = False) -> Case:
    case = f"attention.count.{name}"

    def run(target: Target, seed: int) -> Evidence:
        rng = random(seed, case)
        lengths = decoding if name == "decode" else mixture
        evidence = _count(target, name, rng, lengths(target, name, rng), exact=True)
        if name == "mixed":
            evidence += _count(target, name, rng, lengths(target, name, rng), exact=False)
        return evidence

    return Case(
        case,
        says,
        run,
        frozenset({"core"} | ({"smoke"} if smoke else set())),
        needs=RECIPES[name].needs,
        every_dtype=True,
    )


CASES: tuple[Case, ...] = (
    _case("mixed", "of equal scores every visible token counts once, and no other", smoke=True),
    _case("decode", "decoding rows of every awkward length count each token once"),
    _case("window", "a window counts exactly its own tokens", smoke=True),
)
