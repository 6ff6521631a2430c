"""Plays scenes and holds the result against the oracle: cache first, then padding, numbers, lse.

Knows: what a failure is called in words: which token of which sequence, which slot of which block.
Does not know: what a scene is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.attention_shapes import Rows, batches, shape_of
from vllm_core_conformance.inputs import REGIMES, Random, fill, lay_out
from vllm_core_conformance.oracle.attention import Expected, attention
from vllm_core_conformance.score import judge, require_equal
from vllm_core_conformance.steps import Scene, Seen, Stage
from vllm_core_conformance.target import Target, wide

Numbers = NDArray[Any]


def unit(target: Target) -> str:
    """The dtype whose roundoff judges: the contract asks for float32, also of wider models."""
    return "float32" if target.dtype == "float64" else target.dtype


def play_rows(
    target: Target, name: str, rng: Random, rows: Rows, regime: str, where: str, *, exact: bool
) -> Evidence:
    """Random numbers of a regime in the rows, as many steps as the device's limits make of
    them."""
    shape, evidence = shape_of(target, name), Evidence()
    for step in batches(target, rows):
        layout = lay_out(shape, rng, step, share=True)
        scene = fill(layout, rng, REGIMES[regime], target.round, target.dtype)
        scene.exact_shapes = exact
        evidence += play_and_verify(target, scene, where)
    return evidence


def play_and_verify(target: Target, scene: Scene, where: str) -> Evidence:
    stage = Stage(target, scene.shape)
    stage.write_cache(scene)
    return verify(target, scene, stage.play(scene), where)


def verify(target: Target, scene: Scene, seen: Seen, where: str) -> Evidence:
    """All that a step must do; Failed names the first thing that it did not."""
    expected = attention(scene, unit(target), target.caps.numeric_class)
    evidence = verify_cache(scene, seen, expected.keys, expected.values)
    evidence += verify_padding(scene, seen)
    evidence += verify_out(target, scene, seen, expected, where)
    return evidence


def verify_out(
    target: Target, scene: Scene, seen: Seen, expected: Expected, where: str
) -> Evidence:
    t = scene.num_tokens
    common: dict[str, Any] = {
        "numeric_class": target.caps.numeric_class,
        "blocks": {"token": scene.shape.block_tokens},
    }
    try:
        evidence = judge(
            "attention",
            seen.out[:t],
            expected.out,
            expected.noise,
            dtype=unit(target),
            axes=("token", "head", "dim"),
            where=where,
            **common,
        )
        if scene.shape.return_lse:
            if seen.lse is None:
                raise Failed(f"{where}: return_lse was asked for, and None came")
            evidence += judge(
                "lse",
                seen.lse[:t],
                expected.lse,
                expected.lse_noise,
                dtype="float32",
                axes=("token", "head"),
                where=f"{where}: lse",
                **common,
            )
    except Failed as failure:
        worst = failure.details.get("worst")
        place = "" if worst is None else f" (token {worst[0]} is {name_query(scene, worst[0])})"
        raise Failed(failure.sentence + place, **failure.details) from None
    return evidence


def verify_padding(scene: Scene, seen: Seen) -> Evidence:
    t = scene.num_tokens
    padded = seen.out[t:]
    wrong = ~(padded == 0)
    if wrong.any():
        token = int(np.argmax(wrong.any((1, 2))))
        raise Failed(
            f"padding token {t + token} got {padded[token].ravel()[int(np.argmax(wrong[token]))]} "
            f"as output; the outputs of padding tokens are 0",
            off=int(wrong.sum()),
        )
    return Evidence(checks=int(padded.size))


def verify_inputs(target: Target, scene: Scene, stage: Stage) -> Evidence:
    """attend consumes the cache only: q, k and v of the last step are as they were."""
    arrays = [x.reshape(scene.num_tokens, -1) for x in (scene.q, scene.k, scene.v)]
    wanted = [np.concatenate(arrays, 1)] if scene.shape.fused else arrays
    evidence = Evidence()
    for what, got, want in zip("qkv", target.fetch(stage.inputs), wanted):
        what = "fused q, k and v" if scene.shape.fused else what
        kept = wide(got)[: scene.num_tokens].reshape(want.shape)
        evidence += require_equal(kept, want, f"attend changed its argument {what}")
    return evidence


# ---------------------------------------------------------------- the cache
def verify_cache(scene: Scene, seen: Seen, keys: Numbers, values: Numbers) -> Evidence:
    """The step's K and V stand at their slots, every other slot is as it was, bit for bit."""
    evidence = Evidence()
    for name, got, want in (
        ("K", seen.keys, keys),
        ("V", seen.values, values),
    ):
        try:
            evidence += require_equal(got, want, name, nan_equal=True)
        except Failed as failure:
            sentence = _cache_sentence(scene, name, got, want)
            raise Failed(sentence or failure.sentence, **failure.details) from None
    return evidence


def _cache_sentence(scene: Scene, name: str, got: Numbers, want: Numbers) -> str:
    if got.shape != want.shape:
        return ""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    bad = ~same.all((3, 4))  # [blocks, layers, BT]
    if not bad.any():
        return ""  # only a sign of zero
    new = new_slots(scene)
    places = [(int(a), int(b), int(c)) for a, b, c in np.argwhere(bad)]
    own = [place for place in places if place in new]
    if own:
        return _unwritten(scene, name, got, new, own)
    block, layer, slot = places[0]
    held = _token_that_equals(scene, name, got[block, layer, slot])
    layers = f"layer {layer} (the step is of layer {scene.shape.layer})"
    return (
        f"{int(bad.sum())} slots that the step does not own were changed; first {layers} block "
        f"{block} slot {slot}, which is {name_slot(scene, block, slot)}: its {name} is now {held}"
    )


def _unwritten(
    scene: Scene,
    name: str,
    got: Numbers,
    new: dict[tuple[int, int, int], int],
    own: Sequence[tuple[int, int, int]],
) -> str:
    place = min(own, key=lambda p: new[p])
    old = (scene.keys if name == "K" else scene.values)[place]
    now, token = got[place], new[place]
    if np.array_equal(now, old, equal_nan=True):
        cause = "it was not written"
    else:
        cause = f"it holds {_token_that_equals(scene, name, now)}"
    which = [token for p, token in new.items() if p in set(own)]
    return (
        f"{name} of {name_query(scene, token)} is not at block {place[0]} slot {place[2]} of layer "
        f"{place[1]}: {cause}; so for {len(which)} of the step's {scene.num_tokens} tokens"
    )


def _token_that_equals(scene: Scene, name: str, now: Numbers) -> str:
    for other, step in (
        (name, scene.k if name == "K" else scene.v),
        ("K", scene.k),
        ("V", scene.v),
    ):
        if step.shape[1:] != now.shape:
            continue
        for token in range(scene.num_tokens):
            if np.array_equal(step[token], now):
                return f"{other} of {name_query(scene, token)}"
            if any(np.array_equal(step[token, 0], head) for head in now):
                return f"some heads of {other} of {name_query(scene, token)}"
    if np.all(now == scene.padding) or (np.isnan(scene.padding) and np.isnan(now).all()):
        return "that of a padding token"
    return "other numbers"


def new_slots(scene: Scene) -> dict[tuple[int, int, int], int]:
    """(block, layer, slot) -> token of the step that is written there."""
    size, found, token = scene.shape.block_tokens, {}, 0
    for i in range(len(scene.query)):
        for position in range(int(scene.cached[i]), int(scene.seq_lens[i])):
            block = int(scene.tables[i, position // size])
            found[block, scene.shape.layer, position % size] = token
            token += 1
    return found


# ---------------------------------------------------------------- words
def query_of(scene: Scene, token: int) -> tuple[int, int]:
    """Row and position of a token of the step."""
    row = int(np.searchsorted(scene.starts, token, side="right")) - 1
    return row, int(scene.cached[row] + token - scene.starts[row])


def name_query(scene: Scene, token: int) -> str:
    if token >= scene.num_tokens:
        return "padding"
    row, position = query_of(scene, token)
    own = token - int(scene.starts[row])
    many = f", query {own} of {scene.query[row]} behind {scene.cached[row]} cached"
    return f"token {position} of sequence {row}{many if scene.query[row] > 1 else ''}"


def owners(scene: Scene, block: int, slot: int) -> list[tuple[int, int]]:
    """(sequence, position) of which the slot is, positions past the end included."""
    size, found = scene.shape.block_tokens, []
    for i in range(len(scene.query)):
        need = -(-int(scene.seq_lens[i]) // size)
        for column in np.flatnonzero(scene.tables[i, :need] == block):
            found.append((i, int(column) * size + slot))
    return found


def name_slot(scene: Scene, block: int, slot: int) -> str:
    found = owners(scene, block, slot)
    if not found:
        return "in a block that no sequence of the step owns"
    row, position = found[0]
    if position >= scene.seq_lens[row]:
        past = position - int(scene.seq_lens[row]) + 1
        return f"{past} past the end of sequence {row}"
    return f"token {position} of sequence {row}"
