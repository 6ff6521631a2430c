"""The oracle of the sampler: known answers, a second text in fractions, and its own edges."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vllm_core_conformance.cases.sampling_play import awkward_logits, awkward_request, draw_of
from vllm_core_conformance.oracle.sampling import (
    Draw,
    Request,
    adjusted,
    chi_square,
    distances,
    philox,
    survival,
)


def test_philox_gives_the_known_answers() -> None:
    """kat_vectors of the Random123 distribution, philox4x32 10."""
    ones = 0xFFFFFFFF
    assert philox((0,) * 4, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def slow_token(x: Any, r: Request) -> int:
    """The page of the seam once more, in Python integers and fractions."""
    if r.is_greedy:
        return max(range(len(x)), key=lambda i: (x[i], -i))
    d = [float(v) for v in distances(x, r)]
    w = [round(Fraction(math.exp(-v)) * 2**27) for v in d]
    order = sorted(range(len(x)), key=lambda i: (-float(x[i]), i))
    if r.top_k > 0:
        order = order[: r.top_k]
    total = sum(w[i] for i in order)
    share = max(Fraction(round(float(np.float32(r.top_p)) * 2**24), 2**24), Fraction(1, 2**24))
    kept, mass = [], 0
    for i in order:
        kept.append(i)
        mass += w[i]
        if mass >= share * total:
            break
    kept = [i for i in kept if d[i] <= max(float(r.gap), 2.0**-126)]
    u = philox((r.place, r.sequence_index, 0, 0), (r.seed % 2**32, (r.seed >> 32) % 2**32))[0]
    target, prefix = u * sum(w[i] for i in kept) // 2**32, 0
    for i in sorted(kept):
        prefix += w[i]
        if prefix > target:
            return i
    raise AssertionError("the uniform lies past the mass")


@pytest.mark.parametrize("vocab", [1, 2, 65, 300])
def test_the_token_is_that_of_the_fractions(vocab) -> None:
    for seed in range(4):
        rng = np.random.default_rng([vocab, seed])
        for logits in awkward_logits(rng, vocab):
            request = awkward_request(rng, vocab, logits)
            draw = draw_of(logits, request)
            broken = not np.isfinite(draw.x.max())
            assert draw.token() == (-1 if broken else slow_token(draw.x, request))


def test_bias_bans_and_penalties_by_hand() -> None:
    logits = np.array([1.0, 1.0, 1.0, -1.0, 0.5])
    r = Request(tokens=(0, 1, 1, 3), prompt_len=1, presence=0.5, frequency=0.25, repetition=2.0)
    assert adjusted(logits, r).tolist() == [0.5, -0.5, 1.0, -2.75, 0.5]
    r = Request(position=4, held=(2, 99), held_until=5, bias={0: 2.0, 4: -math.inf})
    assert adjusted(logits, r).tolist() == [3.0, 1.0, -math.inf, -1.0, -math.inf]
    assert adjusted(logits, Request(position=5, held=(2,), held_until=5))[2] == 1.0


def test_an_edge_is_allowed_and_no_more() -> None:
    """The token beside a boundary is allowed while the uniform is within a millionth of it."""
    request = Request(seed=7, position=3)
    u = philox((3, 0, 0, 0), (7, 0))[0] / 2**32
    for off, is_allowed in ((2e-7, True), (-2e-7, True), (3e-5, False)):
        share = u + off  # of token 0: its upper boundary stands beside the uniform
        x = np.log(np.array([share, 1 - share])).astype(np.float32)
        draw = Draw(x, request)
        token = draw.token()
        assert draw.allows(1 - token) is is_allowed


def test_equal_logits_leave_no_edge() -> None:
    x = np.zeros(4, np.float32)
    x[3] = -np.inf
    for seed in range(50):
        draw = Draw(x, Request(seed=seed, top_p=2 / 3))
        token = draw.token()
        assert [i for i in range(4) if i != token and draw.allows(i)] == []


def test_a_boundary_of_top_p_that_exp_may_move_allows_both_cuts() -> None:
    """Two tokens, the first with just the mass that top-p asks for: it may stand alone."""
    x = np.log(np.array([0.7, 0.3])).astype(np.float32)
    share = float(np.float32(1 / (1 + math.exp(-float(np.float32(x[0] - x[1]))))))
    allowed = set()
    for seed in range(40):
        draw = Draw(x, Request(seed=seed, top_p=share))
        token = draw.token()
        allowed.add(token)
        allowed |= {i for i in (0, 1) if draw.allows(i)}
    assert allowed == {0, 1}


def test_a_chi_square_test_knows_its_own_distribution() -> None:
    assert survival(18.307, 10) == pytest.approx(0.05, rel=0.02)
    assert survival(124.342, 100) == pytest.approx(0.05, rel=0.02)
    x = 35.564 / 2  # an even number of degrees has a closed form; the cube errs to the safe side
    exact = math.exp(-x) * sum(x**i / math.factorial(i) for i in range(5))
    assert exact <= survival(2 * x, 10) <= 1.25 * exact
    rng, p = np.random.default_rng(1), np.array([0.5, 0.3, 0.2, 0.0])
    counts = np.bincount(rng.choice(4, 10_000, p=p), minlength=4)
    assert survival(*chi_square(counts, p)) > 1e-3
    counts[3] = 1  # what must never be drawn
    assert math.isinf(chi_square(counts, p)[0])
