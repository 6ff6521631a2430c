"""Cases: the ends of what a step may be, and what attention must refuse or leave alone.

Knows: steps of one token, full tables, refusals. Does not know: how numbers are judged.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.attention_check import (
    play_and_verify,
    play_rows,
    verify,
    verify_inputs,
)
from vllm_core_conformance.cases.attention_shapes import Rows, batches, mixture, shape_of
from vllm_core_conformance.inputs import REGIMES, fill, lay_out, random
from vllm_core_conformance.steps import Stage
from vllm_core_conformance.target import Raised, Target


def _degenerate(target: Target, seed: int) -> Evidence:
    """Padded and exact alternate."""
    rng, evidence = random(seed, "attention.edges.degenerate"), Evidence()
    shape = shape_of(target, "mixed")
    full = shape.width * shape.block_tokens
    steps: dict[str, Rows] = {
        "one token in the step": [(0, 1)],
        "one decoding row": [(shape.block_tokens, 1)],
        "one row that fills its table": [(full - 1, 1)],
        "the last chunk of a row that fills its table": [(full - 3, 3)],
        "prompts only, the smallest first": [(0, 2), (0, 1), (0, 33)],
        "as many rows as there are": [(int(rng.integers(9)), 1)] * shape.rows,
    }
    for says, rows in steps.items():
        for exact in (False, True):
            evidence += play_rows(target, "mixed", rng, rows, "normal", says, exact=exact)
    return evidence


def _new_step(target: Target, seed: int) -> Evidence:
    """One program and one cache: nothing of a step may be kept for the next one."""
    rng, evidence = random(seed, "attention.edges.new_step"), Evidence()
    shape = shape_of(target, "window")
    size = shape.block_tokens
    stage = Stage(target, shape)
    for rows in ([(3 * size, 1), (5, 1)], [(2, 1), (size, 1)], [(size + 2, 1), (2 * size, 1)]):
        for step in batches(target, rows):
            layout = lay_out(shape, rng, step)
            scene = fill(layout, rng, REGIMES["normal"], target.round, target.dtype)
            stage.write_cache(scene)
            seen = stage.play(scene)
            evidence += verify(target, scene, seen, "the same program with another step")
    return evidence


def _narrow_values(target: Target, seed: int) -> Evidence:
    rows = mixture(target, "narrow_values", random(seed, "attention.edges.narrow_values"))
    return _if_accepted(target, seed, "narrow_values", rows, "V heads narrower than K heads")


def _if_accepted(target: Target, seed: int, name: str, rows: Rows, says: str) -> Evidence:
    """Not among what the seam calls mandatory: it may be refused, and must not be wrong."""
    rng = random(seed, says)
    try:
        return play_rows(target, name, rng, rows, "normal", says, exact=True)
    except Raised as raised:
        if isinstance(raised.error, NotSupported):
            return Evidence(checks=1, notes=[f"{says}: refused with NotSupported"])
        raise


def _sinks_with_lse(target: Target, seed: int) -> Evidence:
    shape = replace(shape_of(target, "sinks"), return_lse=True)
    rng = random(seed, "attention.edges.sinks_with_lse")
    layout = lay_out(shape, rng, [(3, 1)])
    scene = fill(layout, rng, REGIMES["normal"], target.round, target.dtype)
    try:
        play_and_verify(target, scene, "return_lse with sinks")
    except Raised as raised:
        if isinstance(raised.error, NotSupported):
            raise
        require(
            isinstance(raised.error, InvalidArgument),
            f"return_lse together with sinks must raise InvalidArgument, but {raised}",
        )
        return Evidence(checks=1)
    raise Failed("return_lse together with sinks was accepted; it must raise InvalidArgument")


def _inputs_kept(target: Target, seed: int) -> Evidence:
    rng, evidence = random(seed, "attention.edges.inputs_kept"), Evidence()
    for name in ("mixed", "mqa"):
        shape = shape_of(target, name)
        for step in batches(target, [(5, 1), (shape.block_tokens, 3)]):
            layout = lay_out(shape, rng, step)
            scene = fill(layout, rng, REGIMES["normal"], target.round, target.dtype)
            stage = Stage(target, shape)
            stage.write_cache(scene)
            stage.play(scene)
            evidence += verify_inputs(target, scene, stage)
    return evidence


CASES: tuple[Case, ...] = (
    Case(
        "attention.edges.degenerate",
        "steps of one token, of one row, of full tables, of as many rows as there are, are right",
        _degenerate,
        frozenset({"core"}),
        every_dtype=True,
    ),
    Case(
        "attention.edges.new_step",
        "a program that runs again takes lengths, tables and rows of the new step",
        _new_step,
        frozenset({"core", "smoke"}),
        needs=("windows",),
        every_dtype=True,
    ),
    Case(
        "attention.edges.narrow_values",
        "V heads of another width than K's are right, or refused",
        _narrow_values,
        frozenset({"core"}),
        every_dtype=True,
    ),
    Case(
        "attention.edges.sinks_with_lse",
        "return_lse together with sinks is refused with InvalidArgument",
        _sinks_with_lse,
        frozenset({"core"}),
        needs=("sinks", "return_lse"),
    ),
    Case(
        "attention.edges.inputs_kept",
        "attend consumes the cache only: q, k and v are as they were",
        _inputs_kept,
        frozenset({"core"}),
        every_dtype=True,
    ),
)
