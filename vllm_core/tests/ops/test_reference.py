"""The laws themselves, against scalar loops that share nothing with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vllm_core.ops import HostArray, reference

RNG = np.random.default_rng(0)
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def test_linear_is_a_sum_of_products_and_a_bias() -> None:
    x, w, b = RNG.normal(size=(3, 5)), RNG.normal(size=(4, 5)), RNG.normal(size=4)
    want = [
        [math.fsum(x[t, i] * w[o, i] for i in range(5)) + b[o] for o in range(4)] for t in range(3)
    ]
    np.testing.assert_allclose(reference.linear(x, w, b), want, **CLOSE)


def test_norms_follow_their_formulas() -> None:
    x, w, b = RNG.normal(size=(2, 7)) + 3, RNG.normal(size=7), RNG.normal(size=7)
    for row, rms, layer in zip(
        x, reference.rms_norm(x, w, 1e-3), reference.layer_norm(x, w, b, 1e-3)
    ):
        scale = 1 / math.sqrt(math.fsum(v * v for v in row) / 7 + 1e-3)
        np.testing.assert_allclose(rms, [v * scale * g for v, g in zip(row, w)], **CLOSE)
        mean = math.fsum(row) / 7
        scale = 1 / math.sqrt(math.fsum((v - mean) ** 2 for v in row) / 7 + 1e-3)
        want = [(v - mean) * scale * g + c for v, g, c in zip(row, w, b)]
        np.testing.assert_allclose(layer, want, **CLOSE)


def test_rope_turns_pairs_half_apart_and_leaves_the_rest() -> None:
    x = RNG.normal(size=(2, 3, 10))
    angle = RNG.uniform(0, 6, (2, 4))
    out = reference.rope(x, np.cos(angle), np.sin(angle))
    for t in range(2):
        for h in range(3):
            for i in range(4):
                turned = complex(x[t, h, i], x[t, h, i + 4]) * complex(
                    math.cos(angle[t, i]), math.sin(angle[t, i])
                )
                assert out[t, h, i] == pytest.approx(turned.real, rel=1e-12)
                assert out[t, h, i + 4] == pytest.approx(turned.imag, rel=1e-12)
    assert (out[..., 8:] == x[..., 8:]).all()


@pytest.mark.parametrize("kind", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations_follow_their_formulas(kind: str) -> None:
    formula = {
        "relu": lambda v: max(v, 0.0),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v * math.erfc(-v / math.sqrt(2)) / 2,
        "gelu_tanh": lambda v: (
            v / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
    }[kind]
    x = np.array([-9.0, -1.5, -1e-9, 0.0, 0.3, 4.0])
    np.testing.assert_allclose(reference.activation(x, kind), [formula(v) for v in x], atol=1e-15)


def routes(logits: list[float], top_k: int, renormalize: bool) -> tuple[list[int], list[float]]:
    total = math.fsum(math.exp(v) for v in logits)
    ids = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    p = [math.exp(logits[e]) / total for e in ids]
    return ids, [v / math.fsum(p) for v in p] if renormalize else p


@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_takes_the_best_experts_ties_to_the_lowest(renormalize: bool) -> None:
    logits = np.round(RNG.normal(size=(6, 9)))
    valid = np.array([True] * 5 + [False])
    ids, shares = reference.moe_route(logits, 4, renormalize, valid)
    for t in range(5):
        want_ids, want = routes(logits[t].tolist(), 4, renormalize)
        assert ids[t].tolist() == want_ids
        np.testing.assert_allclose(shares[t], want, **CLOSE)
    assert ids[5].tolist() == [9] * 4
    assert not shares[5].any()


def test_experts_are_summed_by_their_shares_and_padding_adds_nothing() -> None:
    x, ids = RNG.normal(size=(3, 4)), np.array([[0, 2], [2, 0], [3, 3]], np.int32)
    shares = np.array([[0.25, 0.75], [1.0, 0.5], [0.3, 0.3]])
    gate_up, down = RNG.normal(size=(3, 6, 4)), RNG.normal(size=(3, 4, 3))
    want: HostArray = np.zeros((3, 4))
    for t in range(3):
        for place in range(2):
            e = ids[t, place]
            if e < 3:
                both = gate_up[e] @ x[t]
                hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(both[:3], both[3:])]
                want[t] += shares[t, place] * (down[e] @ np.array(hidden))
    np.testing.assert_allclose(reference.moe_experts(x, ids, shares, gate_up, down), want, **CLOSE)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_follows_its_formula(
    window: int | None, sinks: bool, softcap: float | None
) -> None:
    q, k, v = (RNG.normal(size=s) for s in ((3, 4, 6), (7, 2, 6), (7, 2, 5)))
    sink = RNG.normal(size=4) if sinks else None
    positions = np.array([2, 4, 6])
    out, lse = reference.attention(
        q, k, v, positions, scale=0.3, window=window, softcap=softcap, sinks=sink
    )
    for t, position in enumerate(positions):
        for h in range(4):
            first = 0 if window is None else max(0, position - window + 1)
            scores = [0.3 * float(q[t, h] @ k[j, h // 2]) for j in range(first, position + 1)]
            if softcap is not None:
                scores = [softcap * math.tanh(s / softcap) for s in scores]
            total = math.fsum(math.exp(s) for s in scores)
            assert lse[t, h] == pytest.approx(math.log(total), rel=1e-12)
            if sink is not None:
                total += math.exp(sink[h])
            want = sum(math.exp(s) * v[first + i, h // 2] for i, s in enumerate(scores)) / total
            np.testing.assert_allclose(out[t, h], want, **CLOSE)


def test_attention_ignores_what_it_must_not_see() -> None:
    q, k, v = (RNG.normal(size=s) for s in ((1, 2, 4), (6, 2, 4), (6, 2, 4)))
    clean = reference.attention(q, k, v, np.array([3]), scale=1.0, window=2)
    for dead in (0, 1, 4, 5):
        k[dead], v[dead] = np.nan, np.inf
    for one, other in zip(clean, reference.attention(q, k, v, np.array([3]), scale=1.0, window=2)):
        assert (one == other).all()
    out, lse = reference.attention(q, k[:0], v[:0], np.array([0]), scale=1.0)
    assert not out.any()
    assert (lse == -np.inf).all()
