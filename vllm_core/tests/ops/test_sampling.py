"""The token that is drawn, against big integers, in every framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from vllm_core.errors import NotSupported
from vllm_core.ops import Features, HostArray, sampling
from vllm_core.tests.ops import sampling_oracle as oracle
from vllm_core.tests.ops.frameworks import BINDINGS, compiled, open_binding
from vllm_core.tests.ops.sampling_oracle import Row, pack

ALL = Features(draw=True, filters=True, penalties=True, bias=True)
NUM_ROWS = 24


@lru_cache
def sampler(binding: str, features: Features) -> Callable[..., Any]:
    runtime = open_binding(binding)
    return compiled(
        runtime,
        lambda x, p, at, history, bias: runtime.ops.sample(x, p, at, history, bias, features),
    )


def sample(
    binding: str, logits: HostArray, rows: Sequence[Row], features: Features = ALL
) -> tuple[HostArray, HostArray]:
    asarray = open_binding(binding).ops.asarray
    arrays = (logits, *pack(rows, logits.shape[1]))
    tokens, fault = sampler(binding, features)(*(asarray(x) for x in arrays))
    return np.asarray(tokens), np.asarray(fault)


@lru_cache
def weigher(binding: str) -> Callable[..., Any]:
    runtime = open_binding(binding)
    ops, xp = runtime.ops, runtime.ops.xp
    return compiled(runtime, lambda d: (ops.words(xp.round(xp.exp(-d) * 2.0**sampling.UNIT)),))


def weights_of(binding: str, distance: HostArray) -> HostArray:
    """The weights as this framework's exp rounds them, of rows of distances."""
    (w,) = weigher(binding)(open_binding(binding).ops.asarray(distance))
    return np.asarray(w)


def awkward_logits(rng: np.random.Generator, vocab: int) -> HostArray:
    x = rng.normal(size=(NUM_ROWS, vocab)) * rng.choice([0.1, 1, 4, 20], (NUM_ROWS, 1))
    x[1] = np.round(x[1] * 2) / 2  # massive ties
    x[2] = 7.0
    x[3, rng.random(vocab) < 0.7] = -np.inf
    x[4] = -np.inf
    x[5, :] = np.where(rng.random(vocab) < 0.5, 0.0, -0.0)
    x[6] = rng.normal(size=vocab) * 1e-40  # all ties with 0
    x[7] *= 1e30
    x[8] = -1e4 + np.round(x[8])
    x[9] = np.where(rng.random(vocab) < 0.9, x[9].max(), x[9])
    x[4, rng.integers(vocab)] = -3.0
    x[3, rng.integers(vocab)] = 1.0
    found: HostArray = x.astype(np.float32)
    return found


def awkward_rows(rng: np.random.Generator, vocab: int) -> list[Row]:
    def row() -> Row:
        tokens = tuple(int(t) for t in rng.integers(0, vocab, rng.integers(0, 40)))
        penalized = rng.random() < 0.3
        return Row(
            temperature=float(rng.choice([0, 1e-40, 1e-30, 0.3, 0.8, 1, 1.7, 1e4, 1e38])),
            top_k=int(rng.choice([0, 0, 1, 2, 5, 40, vocab - 1, vocab, vocab + 5])),
            top_p=float(rng.choice([1, 1, 0.999, 0.9, 0.5, 0.1, 1e-9])),
            min_p=float(rng.choice([0, 0, 0.001, 0.05, 0.5, 1])),
            presence=float(rng.choice([-1.5, 0, 0.5])) if penalized else 0.0,
            frequency=float(rng.choice([0, 0.25, 2.0])) if penalized else 0.0,
            repetition=float(rng.choice([0.5, 1, 1.25])) if penalized else 1.0,
            seed=int(rng.integers(-(2**63), 2**63 - 1)),
            sequence_index=int(rng.integers(0, 5)),
            tokens=tokens,
            prompt_len=len(tokens) // 2,
            bias={int(rng.integers(vocab)): 2.5} if rng.random() < 0.3 else {},
            held_until=len(tokens) + int(rng.integers(0, 2)),
            held=(int(rng.integers(vocab)), vocab + 3) if vocab > 1 and rng.random() < 0.3 else (),
        )

    rows = [row() for _ in range(NUM_ROWS)]
    # which of several denormals is the best logit depends on whether a device flushes them: draw
    # there
    rows[6] = replace(rows[6], temperature=1.0)
    return rows


SIZES = (1, 2, 3, 63, 64, 65, 300, 3000)
COMPILED_SIZES = (1, 65)  # each costs a compilation of some seconds


@pytest.mark.parametrize(
    ("binding", "vocab"),
    [
        (binding, vocab)
        for binding in BINDINGS
        for vocab in (COMPILED_SIZES if binding == "jax" else SIZES)
    ],
)
def test_the_token_is_the_one_of_the_big_integers(binding: str, vocab: int) -> None:
    drawn = other_exp = 0
    for seed in range(6):
        rng = np.random.default_rng([vocab, seed])
        logits, rows = awkward_logits(rng, vocab), awkward_rows(rng, vocab)
        tokens, fault = sample(binding, logits, rows)
        adjusted = np.array([oracle.adjusted(x, row) for x, row in zip(logits, rows)])
        assert (fault == ~np.isfinite(adjusted.max(-1))).all()
        live = np.array([row.temperature >= oracle.SMALLEST_NORMAL for row in rows])
        distance = np.full_like(adjusted, np.inf)
        for i in np.flatnonzero(live & (fault == 0)):
            distance[i] = oracle.below(adjusted[i], rows[i])
        own = weights_of(binding, distance)
        for i in np.flatnonzero(fault == 0):
            assert tokens[i] == oracle.draw(adjusted[i], rows[i], own[i]), (i, rows[i])
            drawn += 1
            other_exp += tokens[i] != oracle.draw(adjusted[i], rows[i])
    assert drawn > 100
    # a token may differ from the float64 exp's by the last bit of exp alone: about one draw in a
    # million
    assert other_exp == 0


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_real_vocabulary_draws_the_token_of_the_big_integers(binding: str) -> None:
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(4, 49_152)).astype(np.float32) * 3
    logits[0] = np.round(logits[0])
    logits[1, 40_000:] = logits[1, 17]  # untrained ids, all equal
    rows = [
        Row(temperature=1.3, seed=2**40 + 5, top_p=0.95),
        Row(temperature=0.7, seed=-9, top_k=30_000),
        Row(temperature=1.0, seed=2**63 + 1, top_k=50, top_p=0.9, min_p=0.02),
        Row(temperature=2.0, seed=3, position=4_000_000, sequence_index=7),
    ]
    tokens, _ = sample(binding, logits, rows)
    expected = [oracle.draw(oracle.adjusted(x, row), row) for x, row in zip(logits, rows)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize(
    "features", [Features(), Features(draw=True), Features(draw=True, filters=True)]
)
def test_a_program_with_fewer_branches_draws_the_same(binding: str, features: Features) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(NUM_ROWS, 65)).astype(np.float32)
    rows = [
        Row(
            temperature=1.0 if features.draw and i % 3 else 0.0,
            top_k=5 if features.filters else 0,
            seed=i,
        )
        for i in range(NUM_ROWS)
    ]
    want, _ = sample("numpy", logits, rows)
    tokens, _ = sample(binding, logits, rows, features)
    assert tokens.tolist() == want.tolist()


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.25 + 2**-24, 2), (1e-30, 1)]
)
def test_top_p_keeps_the_shortest_prefix_that_has_its_mass_also_when_equal(
    binding: str, top_p: float, kept: int
) -> None:
    logits = np.full((200, 64), -np.inf, np.float32)
    logits[:, [5, 9, 33, 60]] = 1.5
    rows = [Row(top_p=top_p, seed=i) for i in range(200)]
    tokens, _ = sample(binding, logits, rows)
    assert set(tokens.tolist()) == set([5, 9, 33, 60][:kept])


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("top_k", [1, 2, 7, 199, 200, 201, 10**6])
def test_top_k_keeps_exactly_k_of_equal_logits_the_lowest_ids(binding: str, top_k: int) -> None:
    logits = np.zeros((200, 200), np.float32)
    w = keep(binding, logits, pack([Row(top_k=top_k)] * 200, 200)[0])
    assert ((w > 0) == (np.arange(256) < min(top_k, 200))).all()


@lru_cache
def _keeper(binding: str) -> Callable[..., Any]:
    runtime = open_binding(binding)
    ops = runtime.ops

    def run(x: Any, params: Any) -> tuple[Any]:
        w = ops.words(ops.xp.where(ops.xp.isfinite(x), 1 << 27, 0))
        return (ops.cast(sampling._filtered(ops, x, -x, w, params), "int32"),)

    return compiled(runtime, run)


def keep(binding: str, logits: HostArray, params: HostArray) -> HostArray:
    """[R, V padded] weights that the filters leave of equal ones."""
    size = -logits.shape[1] % sampling.SEGMENT
    x = np.pad(logits, ((0, 0), (0, size)), constant_values=-np.inf)
    ops = open_binding(binding).ops
    (w,) = _keeper(binding)(ops.asarray(x), ops.asarray(params))
    return np.asarray(w)


@pytest.mark.parametrize("binding", BINDINGS)
def test_min_p_keeps_a_token_that_is_exactly_at_its_distance(binding: str) -> None:
    logits = np.full((NUM_ROWS, 65), -9.0, np.float32)
    rows = [Row(min_p=0.5, seed=i) for i in range(NUM_ROWS)]
    logits[:, 4], logits[:, 60] = 0.0, -rows[0].gap
    assert set(sample(binding, logits, rows)[0].tolist()) == {4, 60}
    logits[:, 60] = np.nextafter(np.float32(-rows[0].gap), np.float32(-9))
    assert set(sample(binding, logits, rows)[0].tolist()) == {4}


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_row_that_is_broken_is_flagged_and_changes_no_other(binding: str) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(NUM_ROWS, 65)).astype(np.float32)
    rows = [replace(row, temperature=1.0) for row in awkward_rows(rng, 65)]
    want, none = sample(binding, logits, rows)
    assert not none.any()
    broken = logits.copy()
    broken[2, 7] = np.nan
    broken[5] = -np.inf
    broken[11, 64] = np.inf
    broken[12] = np.nan
    tokens, fault = sample(binding, broken, rows)
    bad = [2, 5, 11, 12]
    assert np.flatnonzero(fault).tolist() == bad
    assert (np.delete(tokens, bad) == np.delete(want, bad)).all()
    assert ((tokens >= 0) & (tokens < 65)).all()


@pytest.mark.parametrize("binding", BINDINGS)
def test_greedy_ties_go_to_the_lowest_id(binding: str) -> None:
    logits = np.zeros((NUM_ROWS, 65), np.float32)
    logits[:, 3::7] = 2.0
    logits[1:, 1] = 2.0
    tokens, _ = sample(binding, logits, [Row(temperature=0.0)] * NUM_ROWS, Features())
    assert tokens.tolist() == [3] + [1] * (NUM_ROWS - 1)


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform(binding: str) -> None:
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(NUM_ROWS, 65)) * 1e30).astype(np.float32)
    cold = [Row(temperature=t, seed=i) for i, t in enumerate([1e-45, 1e-38, 1e-30] * 8)]
    tokens, fault = sample(binding, logits, cold)
    assert (tokens == logits.argmax(-1)).all()
    assert not fault.any()
    hot = [Row(temperature=1e39, seed=i) for i in range(NUM_ROWS)]  # inf in float32
    tokens, _ = sample(binding, logits, hot)
    assert len(set(tokens.tolist())) > 10


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_banned_or_held_token_is_never_drawn_and_a_held_one_only_for_a_time(binding: str) -> None:
    logits = np.zeros((NUM_ROWS, 65), np.float32)
    logits[:, :2] = 20.0
    early = [Row(seed=i, position=4, held_until=5, held=(0,)) for i in range(NUM_ROWS)]
    assert set(sample(binding, logits, early)[0].tolist()) == {1}
    late = [replace(row, position=5) for row in early]
    assert set(sample(binding, logits, late)[0].tolist()) == {0, 1}
    banned = [Row(seed=i, bias={1: -math.inf}) for i in range(NUM_ROWS)]
    assert set(sample(binding, logits, banned)[0].tolist()) == {0}


def test_penalties_look_at_drawn_tokens_and_repetition_at_the_prompt_too() -> None:
    logits = np.ones((3, 8), np.float32)
    logits[:, 7] = -1.0
    rows = [
        Row(temperature=0, tokens=(0, 1, 1), prompt_len=1, presence=0.5),
        Row(temperature=0, tokens=(0, 1, 1), prompt_len=1, frequency=0.5),
        Row(temperature=0, tokens=(0, 7, 1), prompt_len=2, repetition=2.0),
    ]
    ops = open_binding("numpy").ops
    params, positions, history, _ = pack(rows, 8)
    x = sampling._penalized(ops, logits, params, positions, history)
    assert x[:, [0, 1, 2, 7]].tolist() == [
        [1.0, 0.5, 1.0, -1.0],
        [1.0, 0.0, 1.0, -1.0],
        [0.5, 0.5, 1.0, -2.0],
    ]


@pytest.mark.parametrize("binding", BINDINGS)
def test_bias_and_penalties_leave_the_same_bits_in_every_framework(binding: str) -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(NUM_ROWS, 65)).astype(np.float32) * 3
    rows = [
        Row(
            tokens=tuple(rng.integers(0, 65, 60).tolist()),
            prompt_len=20,
            presence=float(rng.normal()),
            frequency=float(rng.normal()),
            repetition=float(rng.uniform(0.5, 2)),
            bias={int(t): float(rng.normal()) for t in rng.integers(0, 65, 9)},
        )
        for _ in range(NUM_ROWS)
    ]
    runtime = open_binding(binding)
    ops = runtime.ops

    def adjust(x: Any, params: Any, positions: Any, history: Any, bias: Any) -> tuple[Any]:
        x = sampling._biased(ops, x, params, positions, bias)
        return (sampling._penalized(ops, x, params, positions, history),)

    (found,) = compiled(runtime, adjust)(*map(ops.asarray, (logits, *pack(rows, 65))))
    want = [oracle.adjusted(x, row) for x, row in zip(logits, rows)]
    assert (np.asarray(found) == np.array(want)).all()


def test_tokens_after_the_draw_do_not_count() -> None:
    row = Row(temperature=0, tokens=(0, 1, 2), prompt_len=0, presence=1.0, position=2)
    ops = open_binding("numpy").ops
    params, positions, history, _ = pack([row], 4)
    x = sampling._penalized(ops, np.zeros((1, 4), np.float32), params, positions, history)
    assert x.tolist() == [[-1.0, -1.0, 0.0, 0.0]]


def test_a_vocabulary_beyond_the_exact_sums_is_refused() -> None:
    with pytest.raises(NotSupported, match="exact sums hold"):
        open_binding("numpy").ops.sample(
            np.zeros((1, 2**19), np.float32), *pack([Row()], 1), Features(draw=True)
        )


def test_the_largest_vocabulary_of_equal_logits_does_not_overflow() -> None:
    row = Row(seed=12, top_p=0.5, top_k=400_000)
    logits = np.zeros((1, sampling.MAX_VOCAB), np.float32)
    tokens, _ = sample("numpy", logits, [row])
    word = oracle.philox((0, 0, 0, 0), (12, 0))[0]
    assert tokens[0] == word * 200_000 >> 32


# ---------------------------------------------------------------- the pieces
@pytest.mark.parametrize("binding", BINDINGS)
def test_philox_gives_the_known_answers(binding: str) -> None:
    # kat_vectors of the Random123 distribution, philox4x32 10
    known = [
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    rng = np.random.default_rng(0)
    cases = [(c, k) for c, k, _ in known]
    cases += [(list(rng.integers(0, 2**32, 4)), list(rng.integers(0, 2**32, 2))) for _ in range(50)]
    for counter, key, answer in known:
        assert oracle.philox(counter, key) == answer
    words = np.array([c + k for c, k in cases], np.uint32).view(np.int32)
    ops = open_binding(binding).ops
    columns = [ops.words(ops.asarray(np.ascontiguousarray(c))) for c in words.T]
    found = ops.host(sampling.philox(ops, columns[:4], (columns[4], columns[5])))
    want = [oracle.philox([int(v) for v in c], [int(v) for v in k])[0] for c, k in cases]
    assert [int(v) for v in found] == want


@pytest.mark.parametrize("binding", BINDINGS)
def test_exact_sums_agree_with_big_integers(binding: str) -> None:
    rng = np.random.default_rng(4)
    w = rng.integers(0, 2**27 + 1, (5, 640)).astype(np.int32)
    w[0], w[1], w[2, 1:] = 2**27, 0, 0
    word = rng.integers(0, 2**32, 5).astype(np.uint32)
    word[:2] = 2**32 - 1, 0
    ops = open_binding(binding).ops
    words = ops.words(ops.asarray(w))

    def value(mass: Any) -> HostArray:
        high, low = (ops.host(x).astype(np.int64).astype(object) for x in mass)
        assert (low < 2**14).all()
        return np.asarray(high * 2**14 + low)

    exact = w.astype(object)
    total = sampling.mass(ops, words)
    assert (value(total) == exact.sum(-1)).all()
    assert (value(sampling._prefix(ops, words)) == exact.cumsum(-1)).all()
    part, is_exact = sampling.scaled(ops, ops.words(ops.asarray(word.view(np.int32))), total)
    product = word.astype(object) * exact.sum(-1)
    assert (value(part) == product // 2**32).all()
    assert ops.host(is_exact).tolist() == [int(p) % 2**32 == 0 for p in product]


@pytest.mark.parametrize("binding", BINDINGS)
def test_scaling_a_mass_carries_into_every_word(binding: str) -> None:
    rng = np.random.default_rng(5)
    word = rng.integers(0, 2**32, 4000).astype(np.uint32)
    mass = rng.integers(0, 2**46, 4000)
    word[:4], mass[:4] = 2**32 - 1, (2**46 - 1, 2**14, 2**14 - 1, 1)
    ops = open_binding(binding).ops
    pair = tuple(
        ops.words(ops.asarray(v.astype(np.uint32).view(np.int32)))
        for v in (mass >> 14, mass % 2**14)
    )
    (high, low), is_exact = sampling.scaled(ops, ops.words(ops.asarray(word.view(np.int32))), pair)
    product = word.astype(object) * mass.astype(object)
    found = ops.host(high).astype(object) * 2**14 + ops.host(low).astype(object)
    assert (found == product >> 32).all()
    assert (ops.host(is_exact) == (product % 2**32 == 0)).all()
