"""Judges steps over a cache of 8 bits: the codes that they wrote by the law, then what attention
made of just these codes.

So a code that lies between two, and is rounded either way, is right, and needs no room in the
limits of attention.

Knows: what a wrong scale or code is called in words. Does not know: what a scene is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.attention_check import (
    name_query,
    new_slots,
    unit,
    verify_cache,
    verify_out,
    verify_padding,
)
from vllm_core_conformance.oracle import kv8
from vllm_core_conformance.oracle.attention import attention
from vllm_core_conformance.steps import Scene, Seen
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]


def in_codes(scene: Scene) -> Scene:
    """The same with a cache that 8 bits hold."""
    return replace(scene, keys=kv8.held(scene.keys), values=kv8.held(scene.values))


def verify_in_codes(target: Target, scene: Scene, seen: Seen, where: str) -> Evidence:
    """All that a step must do; Failed names the first thing that it did not."""
    evidence = verify_codes(scene, seen)
    held = as_held(scene, seen)
    expected = attention(held, unit(target), target.caps.numeric_class)
    evidence += verify_cache(held, seen, expected.keys, expected.values)
    evidence += verify_padding(scene, seen)
    evidence += verify_out(target, held, seen, expected, where)
    return evidence


def as_held(scene: Scene, seen: Seen) -> Scene:
    """The step with the K and V that its cache has made of them."""
    here = places(scene)
    return replace(scene, k=seen.keys[here], v=seen.values[here])


def places(scene: Scene) -> tuple[Numbers, Numbers, Numbers]:
    """(block, layer, slot) of each token of the step."""
    found = np.array(list(new_slots(scene)), np.int64).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def verify_codes(scene: Scene, seen: Seen) -> Evidence:
    """The step's own vectors; those with NaN or infinity have a scale that is no number."""
    here, evidence = places(scene), Evidence()
    for name, x in (("k", scene.k), ("v", scene.v)):
        codes, scales = seen.codes[name][here], seen.codes[f"{name}_scale"][here]
        with np.errstate(over="ignore", invalid="ignore"):
            x = x.astype(np.float32).astype(np.float64)
            _, right = kv8.quantise(x)
            quotients = kv8.quotients(x, right)
            bad = np.isnan(right)
            is_right = np.where(bad, ~np.isfinite(scales), _near(scales, right))
        if not is_right.all():
            raise Failed(_scale_sentence(scene, name, x, scales, right, is_right))
        is_right = (np.abs(codes - quotients) <= kv8.BETWEEN) | bad[..., None]
        is_right &= (np.abs(codes) <= 127) | bad[..., None]
        if not is_right.all():
            raise Failed(_code_sentence(scene, name, codes, quotients, is_right))
        evidence.checks += codes.size + scales.size
    return evidence


def _near(scales: Numbers, right: Numbers) -> Numbers:
    found: Numbers = np.abs(scales - right) <= kv8.ULP * right
    return found


# ---------------------------------------------------------------- words
def _scale_sentence(
    scene: Scene, name: str, x: Numbers, scales: Numbers, right: Numbers, is_right: Numbers
) -> str:
    token, head = (int(i) for i in np.argwhere(~is_right)[0])
    vector = f"{name.upper()} of {name_query(scene, token)}, KV head {head}"
    if np.isnan(right[token, head]):
        return (
            f"{vector} holds NaN or infinity, and its scale is {scales[token, head]:.6g}: what "
            "reads it would be a number"
        )
    causes = [what for what, other in _scales_of_mistakes(scene, name, x) if _fits(scales, other)]
    return (
        f"the scale of {vector} is {scales[token, head]:.7g}, expected max|{name}| / 127 = "
        f"{right[token, head]:.7g}; so for {int((~is_right).sum())} of {is_right.size} vectors"
        + (f"; it fits {causes[0]}" if causes else "")
    )


def _fits(scales: Numbers, other: Numbers) -> bool:
    with np.errstate(invalid="ignore"):
        return bool((np.abs(scales - other) <= 1e-5 * np.abs(other)).mean() > 0.99)


def _scales_of_mistakes(scene: Scene, name: str, x: Numbers) -> Iterator[tuple[str, Numbers]]:
    amax = np.abs(x).max(-1)
    shape = amax.shape
    yield "one scale for all heads", np.broadcast_to(amax.max(-1, keepdims=True) / 127, shape)
    yield "one scale for all of the step", np.full(shape, amax.max() / 127)
    yield "the largest value instead of the largest magnitude", x.max(-1) / 127
    for divisor in (126, 127.5, 128, 255):
        yield f"max|{name}| / {divisor}", amax / divisor
    other = scene.v if name == "k" else scene.k
    yield "the scale of the other of K and V", np.abs(other).max(-1) / 127
    yield "the scale of the next head", np.roll(amax, -1, 1) / 127
    blocks, _, _ = places(scene)
    of_block = np.stack([amax[blocks == block].max(0) for block in blocks]) / 127
    yield "one scale for all tokens of a block", of_block
    yield "a scale rounded to float16", (amax / 127).astype(np.float16).astype(np.float64)


def _code_sentence(
    scene: Scene, name: str, codes: Numbers, quotients: Numbers, is_right: Numbers
) -> str:
    token, head, lane = (int(i) for i in np.argwhere(~is_right)[0])
    shares = [((codes == other).mean(), what) for what, other in _codes_of_mistakes(quotients)]
    share, cause = max(shares)
    return (
        f"{name.upper()} of {name_query(scene, token)}, KV head {head}, place {lane} has code "
        f"{codes[token, head, lane]:.0f}; {name} / scale is {quotients[token, head, lane]:.4f}; so "
        f"for {int((~is_right).sum())} of {is_right.size} codes"
        + (f"; it fits codes that are {cause}" if share > 0.98 else "")
    )


def _codes_of_mistakes(quotients: Numbers) -> Iterator[tuple[str, Numbers]]:
    whole = np.rint(np.nan_to_num(quotients))
    yield "cut off towards zero", np.trunc(quotients)
    yield "rounded down", np.floor(quotients)
    yield "rounded up", np.ceil(quotients)
    for most in (126, 125, 63):
        yield f"cut to {-most}..{most}", np.clip(whole, -most, most)
    yield "cut to 0..127: their sign is lost", np.clip(whole, 0, 127)
    yield "moved by 128", (whole + 128) % 256 - 128
