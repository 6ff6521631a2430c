"""Cases: what a step must not look at changes no bit of its output (R9).

The same step is played with 0, NaN, infinities and another request's numbers in all unused bytes:
slots past the end, blocks behind the window, blocks of nobody, other layers, padding tokens, stale
cells of the tables, what a slot held before the step.

Knows: which bytes are unused. Does not know: what is right (other cases know).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Case, Evidence, Failed
from vllm_core_conformance.cases.attention_check import name_query, verify_padding
from vllm_core_conformance.cases.attention_shapes import (
    RECIPES,
    batches,
    decoding,
    mixture,
    shape_of,
)
from vllm_core_conformance.inputs import REGIMES, fill, lay_out, poisoned, random
from vllm_core_conformance.steps import Scene, Seen, Stage
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]

POISONS: dict[str, float | None] = {
    "NaN": np.nan,
    "infinities": np.inf,
    "another request's numbers": None,
}


def play_poisoned(target: Target, name: str, seed: int, *, exact: bool) -> Evidence:
    """A step of the shape with each poison in all that it must not look at."""
    rng = random(seed, f"attention.poison.{name}")
    evidence = Evidence()
    lengths = decoding if name == "decode" else mixture
    for step in batches(target, lengths(target, name, rng)):
        layout = lay_out(shape_of(target, name), rng, step, share=True, stale=False)
        scene = fill(layout, rng, REGIMES["normal"], target.round, target.dtype)
        clean = poisoned(scene, layout, rng, 0.0, target.round)
        clean.exact_shapes = exact
        first, again = _see(target, clean), _see(target, clean)
        repeats = _difference(first, again, clean) is None
        for what, value in POISONS.items():
            dirty = poisoned(scene, layout, rng, value, target.round)
            dirty.exact_shapes = exact
            seen = _see(target, dirty)
            evidence += verify_padding(dirty, seen)
            evidence += _require_same(target, first, seen, dirty, what, repeats)
    return evidence


def _see(target: Target, scene: Scene) -> Seen:
    """Played twice, so that padding has been in the null block when it counts."""
    stage = Stage(target, scene.shape)
    stage.write_cache(scene)
    stage.play(scene)
    stage.write_cache(scene)
    return stage.play(scene)


def _require_same(
    target: Target, clean: Seen, seen: Seen, scene: Scene, what: str, repeats: bool
) -> Evidence:
    t = scene.num_tokens
    checks = int(seen.out[:t].size)
    found = _difference(clean, seen, scene)
    if found is None:
        return Evidence(checks=checks)
    token, head, before, after = found
    is_plain = (
        np.isfinite(before)
        and np.isfinite(after)
        and abs(after - before) < 0.05 * (1 + abs(before))
    )
    if is_plain and (not repeats or _difference(_see(target, scene), seen, scene) is not None):
        # the same step twice does not give the same bits: then small differences prove nothing
        return Evidence(checks=checks, notes=["outputs do not repeat bit for bit"])
    raise Failed(
        f"{what} in what the step must not look at changed its output: query {token} head {head} "
        f"({name_query(scene, token)}) gave {after:.6g} instead of {before:.6g}: {_guess(scene)}",
        token=token,
        head=head,
    )


def _guess(scene: Scene) -> str:
    where = "slots past the end, a stale cell of the table, other layers, padding tokens"
    return (
        "one of: blocks behind the window, " + where if scene.shape.window else "one of: " + where
    )


def _difference(a: Seen, b: Seen, scene: Scene) -> tuple[int, int, float, float] | None:
    """First (token, head, a, b) of outputs or lse whose bits differ."""
    t = scene.num_tokens
    pairs = [(a.out[:t], b.out[:t])]
    if a.lse is not None and b.lse is not None:
        pairs.append((a.lse[:t, :, None], b.lse[:t, :, None]))
    for x, y in pairs:
        same = (x == y) & (np.signbit(x) == np.signbit(y))
        if not same.all():
            token, head, lane = (int(i) for i in np.argwhere(~same)[0])
            return token, head, float(x[token, head, lane]), float(y[token, head, lane])
    return None


def _case(name: str, says: str, smoke: bool = False) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        evidence = play_poisoned(target, name, seed, exact=False)
        if name == "mixed" and not target.is_static:
            evidence += play_poisoned(target, name, seed + 1_000_003, exact=True)
        return evidence

    return Case(
        f"attention.poison.{name}",
        says,
        run,
        frozenset({"core"} | ({"smoke"} if smoke else set())),
        needs=RECIPES[name].needs,
        every_dtype=True,
    )


CASES: tuple[Case, ...] = (
    _case("mixed", "unused bytes change no bit of a mixed step", smoke=True),
    _case("decode", "unused bytes change no bit of decoding rows"),
    _case("window", "what has left the window changes no bit", smoke=True),
    _case("softcap_window", "unused bytes change no bit under softcap and a window"),
    _case("sinks", "unused bytes change no bit beside sinks"),
)
