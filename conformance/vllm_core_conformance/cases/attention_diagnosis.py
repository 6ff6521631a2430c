"""Says which token a wrong answer came from, and what mistake gives that one.

Knows: coded scenes. Does not know: numbers that are nearly right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.attention_check import name_slot, owners, query_of
from vllm_core_conformance.coded import Coded, Place
from vllm_core_conformance.steps import Seen

Numbers = NDArray[Any]

TOLERANCE = 0.02
"""Answers are -1 and 1; how precise they are is not asked here."""


def require_answers(coded: Coded, seen: Seen) -> Evidence:
    """Every query returns its token, or Failed names the one that it returned."""
    got = seen.out[: len(coded.answers)]
    wrong = ~(np.abs(got - coded.answers) <= TOLERANCE).all(-1)
    if not wrong.any():
        return Evidence(checks=int(wrong.size))
    named = coded.named()
    places = np.argwhere(wrong)
    stories = []
    for token, head in places[np.linspace(0, len(places) - 1, min(40, len(places))).astype(int)]:
        stories.append(_story(coded, named, int(token), int(head), got[token, head]))
    stories.sort(key=lambda story: story[0])  # the most telling first
    counted: dict[str, int] = {}
    for _, _, cause in stories:
        counted[cause] = counted.get(cause, 0) + 1
    raise Failed(
        f"{stories[0][1]}: {stories[0][2]} ({len(places)} of {wrong.size} answers are wrong)",
        off=len(places),
        of=int(wrong.size),
        causes=counted,
    )


def _story(
    coded: Coded, named: dict[bytes, Place], token: int, head: int, got: Numbers
) -> tuple[int, str, str]:
    """(rank, what came, why); lower ranks tell more."""
    shape, scene = coded.scene.shape, coded.scene
    row, position = query_of(scene, token)
    kv_head = head // shape.queries_per_kv
    who = f"query {token} head {head} (kv head {kv_head})"
    target = int(coded.targets[token, head])
    expected = _expected(coded, row, target)
    if not np.isfinite(got).all():
        return (
            3,
            f"{who} returned {got[~np.isfinite(got)][0]}; expected {expected}",
            ("something that no query may see holds NaN, or an exponent overflowed"),
        )
    if (np.abs(got) <= TOLERANCE).all():
        return 4, f"{who} returned 0; expected {expected}", "the output was not written"
    for weight, rank, what in ((1, 1, ""), (2, 0, f"the mean of token {target} and ")):
        rest = weight * got - (weight - 1) * coded.answers[token, head]
        found = named.get((rest > 0).tobytes())
        if found is not None and (np.abs(np.abs(rest) - 1) <= weight * TOLERANCE).all():
            cause, tells = _cause(coded, row, position, target, kv_head, head, found, weight == 2)
            rank = rank if tells else 2
            return (
                rank,
                f"{who} returned {what}{_name(coded, row, kv_head, found)}; expected {expected}",
                cause,
            )
    same = float((np.sign(got) == coded.answers[token, head]).mean())
    return (
        5,
        f"{who} returned a mix of several tokens; expected {expected}",
        (f"{same:.0%} of its signs are the expected ones"),
    )


def _expected(coded: Coded, row: int, target: int) -> str:
    size = coded.scene.shape.block_tokens
    block = int(coded.scene.tables[row, target // size])
    return f"token {target} (block {block} slot {target % size})"


def _name(coded: Coded, row: int, kv_head: int, found: Place) -> str:
    scene, shape = coded.scene, coded.scene.shape
    own = [p for i, p in owners(scene, found.block, found.slot) if i == row]
    if own and own[0] < scene.seq_lens[row]:
        what = f"token {own[0]} of sequence {row}"
    else:
        what = "what lies " + name_slot(scene, found.block, found.slot)
        what = what.replace("what lies token", "token")
    more = "" if found.head == kv_head else f", kv head {found.head}"
    more += "" if found.layer == shape.layer else f" in layer {found.layer}"
    more += ", before the step wrote it" if found.stale and _is_new(coded, found) else ""
    return f"{what} (block {found.block} slot {found.slot}{more})"


def _is_new(coded: Coded, found: Place) -> bool:
    return any(
        coded.scene.cached[i] <= p < coded.scene.seq_lens[i]
        for i, p in owners(coded.scene, found.block, found.slot)
    )


def _cause(
    coded: Coded,
    row: int,
    position: int,
    target: int,
    kv_head: int,
    head: int,
    found: Place,
    is_mean: bool,
) -> tuple[str, bool]:
    """The likely mistake, and whether it tells more than that something is wrong."""
    scene, shape = coded.scene, coded.scene.shape
    if found.stale:
        return "the slot was read before the step's K and V were written", True
    if found.layer != shape.layer:
        return f"K or V of another layer ({found.layer} instead of {shape.layer})", True
    if found.head != kv_head:
        if found.head == head % shape.num_kv_heads:
            return "query head h reads KV head h // G, not h % Hkv", True
        return "another KV head", True
    owned = owners(scene, found.block, found.slot)
    own = [p for i, p in owned if i == row]
    if not own:
        return _foreign(coded, row, target, found, owned), True
    return _within(coded, row, position, target, own[0], is_mean)


def _foreign(
    coded: Coded, row: int, target: int, found: Place, owned: list[tuple[int, int]]
) -> str:
    scene, shape = coded.scene, coded.scene.shape
    cells = np.flatnonzero(scene.tables[row] == found.block)
    need = -(-int(scene.seq_lens[row]) // shape.block_tokens)
    if len(cells):
        where = "past its end" if cells[0] >= need else "behind its window"
        return f"column {cells[0]} of the sequence's table, {where}, was followed"
    if any(p == target for _, p in owned):
        return "the same position of another sequence: its table or its start was taken"
    if owned:
        return "a token of another sequence"
    return "a block of no sequence of the step, nor in its table: a wrong block id"


def _within(
    coded: Coded, row: int, position: int, target: int, got: int, is_mean: bool
) -> tuple[str, bool]:
    """Both in one sequence."""
    scene, shape = coded.scene, coded.scene.shape
    size, step = shape.block_tokens, got - target
    first = 0 if shape.window is None else max(0, position - shape.window + 1)
    if got >= scene.seq_lens[row]:
        return f"{got - int(scene.seq_lens[row]) + 1} past the end of the sequence", True
    if got > position:
        return f"the causal mask lets a token {got - position} after the query through", True
    if got < first:
        return f"outside the window of {shape.window}, by {first - got}", True
    if abs(step) == 1:
        at_edge = min(got, target) % size == size - 1
        return "off by one at a block boundary" if at_edge else "off by one", True
    if target == position:
        return "a query does not see its own token", True
    if target == first and shape.window is not None:
        return f"the first token of the window of {shape.window} is not seen", True
    if step % size == 0:
        many = abs(step) // size
        return (
            f"{many} block{'s' * (many > 1)} {'before' if step < 0 else 'behind'} the right one",
            True,
        )
    if is_mean:
        return "two tokens weigh the same, of which one has another key", True
    if got // size == target // size:
        return "the right block, another slot of it", False
    return "the expected token is not seen, or under another key", False
