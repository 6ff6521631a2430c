"""Cases: every query must return one known token (R2); a wrong answer names the one it read.

Knows: which shapes and lengths. Does not know: how answers are coded or named.
"""

from __future__ import annotations

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.attention_check import verify_cache, verify_padding
from vllm_core_conformance.cases.attention_diagnosis import require_answers
from vllm_core_conformance.cases.attention_shapes import (
    RECIPES,
    Rows,
    batches,
    decoding,
    mixture,
    shape_of,
)
from vllm_core_conformance.coded import Coded, code
from vllm_core_conformance.inputs import Random, lay_out, random
from vllm_core_conformance.oracle.attention import cache_after
from vllm_core_conformance.steps import Seen, Stage
from vllm_core_conformance.target import Target


def play_coded(target: Target, name: str, rng: Random, rows: Rows, *, exact: bool) -> Evidence:
    """Rows in as many steps as the device's limits make of them."""
    evidence = Evidence()
    for step in batches(target, rows):
        coded = code(lay_out(shape_of(target, name), rng, step, share=True), rng)
        coded.scene.exact_shapes = exact
        stage = Stage(target, coded.scene.shape)
        stage.write_cache(coded.scene)
        evidence += verify_coded(coded, stage.play(coded.scene))
    return evidence


def verify_coded(coded: Coded, seen: Seen) -> Evidence:
    """Answers first: they tell more than the cache does."""
    evidence = require_answers(coded, seen)
    evidence += verify_padding(coded.scene, seen)
    keys, values = cache_after(coded.scene)
    keys[0] = values[0] = 0.0
    evidence += verify_cache(coded.scene, seen, keys, values)
    return evidence


def _mixed(case: str, name: str) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        rng, evidence = random(seed, case), Evidence()
        for exact in (False, True):  # the second one meets what the first one left behind
            evidence += play_coded(target, name, rng, mixture(target, name, rng), exact=exact)
        return evidence

    return Case(
        case,
        "every query of a mixed step returns the one token that its key belongs to",
        run,
        frozenset({"core"} | ({"smoke"} if name in ("mixed", "window") else set())),
        needs=RECIPES[name].needs,
        every_dtype=True,
    )


def _decode(target: Target, seed: int) -> Evidence:
    rng, evidence = random(seed, "attention.coded.decode"), Evidence()
    for exact in (True, False):
        evidence += play_coded(target, "decode", rng, decoding(target, "decode", rng), exact=exact)
    return evidence


def _long(target: Target, seed: int) -> Evidence:
    rng = random(seed, "attention.coded.long")
    size = shape_of(target, "long").block_tokens
    middle = 2048 - 2048 % size
    rows = [(4900 + int(rng.integers(150)), 1), (middle, 1), (middle - 1, 1), (1023, 9)]
    return play_coded(target, "long", rng, rows, exact=bool(seed % 2))


def _very_long(target: Target, seed: int) -> Evidence:
    rng, evidence = random(seed, "attention.coded.very_long"), Evidence()
    evidence += play_coded(
        target, "very_long", rng, [(32_900 + int(rng.integers(200)), 1), (130, 3)], exact=False
    )
    return evidence


CASES: tuple[Case, ...] = (
    _mixed("attention.coded.mixed", "mixed"),
    Case(
        "attention.coded.decode",
        "every decoding row, at any edge of a block or tile, returns the one token it asks for",
        _decode,
        frozenset({"core", "smoke"}),
        every_dtype=True,
    ),
    _mixed("attention.coded.window", "window"),
    _mixed("attention.coded.window_short", "window_short"),
    _mixed("attention.coded.largest_block", "largest_block"),
    Case(
        "attention.coded.long",
        "single tokens are found in contexts of thousands",
        _long,
        frozenset({"core"}),
        every_dtype=True,
    ),
    Case(
        "attention.coded.very_long",
        "single tokens are found in a context of 33,000",
        _very_long,
        frozenset({"core"}),
        every_dtype=True,
    ),
)
