"""Cases: the KV cache in 8 bits: codes and scales by the law, attention over what they are worth.

Knows: which shapes and numbers hurt such a cache. Does not know: how they are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases import quantised_kv_blocks, quantised_kv_steps
from vllm_core_conformance.cases.attention_check import name_query, unit, verify_padding
from vllm_core_conformance.cases.attention_poison import play_poisoned
from vllm_core_conformance.cases.attention_shapes import (
    INT8,
    Rows,
    batches,
    decoding,
    mixture,
    recipe_of,
    shape_of,
)
from vllm_core_conformance.cases.quantised_kv_check import (
    as_held,
    in_codes,
    places,
    verify_codes,
    verify_in_codes,
)
from vllm_core_conformance.inputs import REGIMES, Random, fill, lay_out, random
from vllm_core_conformance.oracle.attention import attention, rows_of
from vllm_core_conformance.score import judge
from vllm_core_conformance.steps import Scene, Seen, Stage
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]

PROFILE = frozenset({"quantised"})
Lengths = Callable[[Target, str, Random], Rows]


def _prompts(target: Target, name: str, rng: Random) -> Rows:
    return [(100, 1), (0, 129), (256 + int(rng.integers(3)), 63), (382, 129)]


def _numbers(
    what: str,
    recipe: str,
    says: str,
    lengths: Lengths = mixture,
    regime: str = "normal",
) -> Case:
    case, name = f"quantised.kv.{what}", INT8 + recipe

    def run(target: Target, seed: int) -> Evidence:
        rng, evidence = random(seed, case), Evidence()
        shape = shape_of(target, name)
        for rows in batches(target, lengths(target, name, rng)):
            layout = lay_out(shape, rng, rows, share=True)
            scene = fill(layout, rng, REGIMES[regime], target.round, target.dtype)
            scene = in_codes(scene)
            scene.exact_shapes = True
            stage = Stage(target, shape)
            stage.write_cache(scene)
            evidence += verify_in_codes(target, scene, stage.play(scene), says)
        return evidence

    return _case(what, f"{says} over a cache of 8 bits: right to its own rounding", run, recipe)


def _case(
    what: str, says: str, run: Callable[[Target, int], Evidence], recipe: str = "mixed"
) -> Case:
    return Case(
        f"quantised.kv.{what}",
        says,
        run,
        PROFILE,
        needs=recipe_of(INT8 + recipe).needs,
        every_dtype=True,
    )


# ---------------------------------------------------------------- what is not a number
def _not_numbers(recipe: str, lengths: Lengths, count: int) -> Case:
    """In some vectors of the cache and of the step, K's or V's, of one head: queries that see one
    have no number in the query heads of that head; other sequences and other heads are right."""
    what, name = f"not_numbers.{recipe}", INT8 + recipe

    def run(target: Target, seed: int) -> Evidence:
        rng, evidence = random(seed, f"quantised.kv.{what}"), Evidence()
        for rows in batches(target, lengths(target, name, rng)):
            evidence += _bad_vectors(target, rng, name, rows, count)
        return evidence

    says = f"NaN and infinity stay in their sequence and head, and are seen ({recipe})"
    return _case(what, says, run, recipe)


def _bad_vectors(target: Target, rng: Random, name: str, rows: Rows, count: int) -> Evidence:
    shape = shape_of(target, name)
    layout = lay_out(shape, rng, rows)
    scene = in_codes(fill(layout, rng, REGIMES["normal"], target.round, target.dtype))
    kinds = (np.nan, np.inf, -np.inf)
    for place, x in enumerate((scene.k, scene.v)):
        for token in rng.choice(len(x), min(count, len(x)), replace=False):
            value = kinds[int(rng.integers(3))]
            x[token, place % x.shape[1], int(rng.integers(x.shape[-1]))] = value
    for x in (scene.keys, scene.values):  # the last token that a row has cached
        row = int(rng.integers(len(scene.query)))
        if scene.cached[row]:
            block, slot = divmod(int(scene.cached[row]) - 1, shape.block_tokens)
            x[scene.tables[row, block], shape.layer, slot, 0] = np.nan
    stage = Stage(target, shape)
    stage.write_cache(scene)
    seen = stage.play(scene)
    return _judge_rest(target, scene, seen)


def _judge_rest(target: Target, scene: Scene, seen: Seen) -> Evidence:
    evidence = verify_codes(scene, seen) if len(scene.k) else Evidence()
    held, t = as_held(scene, seen), scene.num_tokens
    touched, near = _touched(held)
    wrong = np.isfinite(seen.out[:t]).any(-1) & touched
    if wrong.any():
        token, head = (int(i) for i in np.argwhere(wrong)[0])
        raise Failed(
            f"{name_query(scene, token)} sees a K or V that is not a number, and head {head} gives "
            f"{seen.out[token, head][np.isfinite(seen.out[token, head])][0]:.6g}: the fault would "
            "not be noticed"
        )
    parts = {n: np.nan_to_num(getattr(held, n)) for n in ("k", "v", "keys", "values")}
    expected = attention(replace(held, **parts), unit(target), target.caps.numeric_class)
    evidence += judge(
        "attention",
        seen.out[:t][~near],
        expected.out[~near],
        expected.noise[~near],
        dtype=unit(target),
        numeric_class=target.caps.numeric_class,
        axes=("query and head", "dim"),
        where="sequences and heads without NaN, in a step where others have it",
    )
    evidence += verify_padding(scene, seen)
    return evidence


def _touched(scene: Scene) -> tuple[Numbers, Numbers]:
    """[t, Hq] twice: which queries see a K or V that is not a number; and which are of a sequence
    that has one, perhaps behind them: a kernel may multiply it with 0."""
    both = np.concatenate((scene.keys, scene.values), -1)
    bad: Numbers = np.asarray(~np.isfinite(both).all(-1))
    here = places(scene)
    bad[here] = ~np.isfinite(scene.k).all(-1) | ~np.isfinite(scene.v).all(-1)
    touched, near = np.zeros((2, scene.num_tokens, scene.shape.num_kv_heads), bool)
    for row in rows_of(scene, bad, bad):
        touched[row.begin : row.end] = (row.visible[:, :, None] & row.keys[None]).any(1)
        near[row.begin : row.end] = row.keys.any(0)
    each = scene.shape.queries_per_kv
    return np.repeat(touched, each, 1), np.repeat(near, each, 1)


# ---------------------------------------------------------------- zeros
def _zeros(target: Target, seed: int) -> Evidence:
    """Vectors of zeros alone: scale 0; outputs of V that is 0 are 0."""
    rng, evidence = random(seed, "quantised.kv.zeros"), Evidence()
    name = INT8 + "smallest_block"
    shape, steps = shape_of(target, name), batches(target, mixture(target, name, rng))
    for of_keys, rows in product((True, False), steps):
        layout = lay_out(shape, rng, rows)
        scene = in_codes(fill(layout, rng, REGIMES["normal"], target.round, target.dtype))
        for x in (scene.keys, scene.k) if of_keys else (scene.values, scene.v):
            x[..., 0, :] = 0
        scene.k[::2, 1] = scene.v[::3, 1] = -0.0
        stage = Stage(target, shape)
        stage.write_cache(scene)
        seen = stage.play(scene)
        evidence += verify_in_codes(target, scene, seen, "vectors of zeros")
        zero = slice(0, shape.queries_per_kv)
        require(
            bool(of_keys or (seen.out[: scene.num_tokens, zero] == 0).all()),
            "all V of a head is 0, and its output is not",
        )
    return evidence


def _poison(recipe: str) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        return play_poisoned(target, INT8 + recipe, seed, exact=recipe == "mixed")

    says = "unused codes and scales change no bit"
    return _case(f"poison.{recipe}", f"{says} ({recipe})", run, recipe)


CASES: tuple[Case, ...] = (
    _numbers("mixed", "mixed", "prompts, chunks and decoding rows in one step"),
    _numbers("decode", "decode", "dozens of decoding rows", decoding),
    _numbers("prompts", "prefill", "long chunks", _prompts),
    _numbers("one_kv_head", "mqa", "20 query heads on one KV head"),
    _numbers("largest_block", "largest_block", "the largest block, two groups in one pool"),
    _numbers("smallest_block", "smallest_block", "the smallest block, heads of 16"),
    _numbers("window", "window", "a window that is no multiple of a block"),
    _numbers("window_sinks", "window_sinks", "sinks and a window of many blocks"),
    _numbers("softcap_window", "softcap_window", "softcap and a window, heads of 256"),
    _numbers("uneven", "mixed", "tokens of every size, one far larger than all", regime="uneven"),
    _numbers(
        "uneven_decode", "decode", "decoding over tokens of every size", decoding, regime="uneven"
    ),
    _numbers("outlier", "mixed", "one channel 1000 times larger", regime="outlier"),
    _numbers("peaked", "mixed", "scores that single out few tokens", regime="peaked"),
    _numbers("tiny", "mixed", "numbers near the end of the range", regime="tiny"),
    _case("zeros", "vectors of zeros have scale 0", _zeros, "smallest_block"),
    _not_numbers("mixed", mixture, 2),
    _not_numbers("decode", decoding, 6),
    _poison("mixed"),
    _poison("window"),
    *quantised_kv_steps.CASES,
    *quantised_kv_blocks.CASES,
)
