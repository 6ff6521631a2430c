"""The two oracles of attention agree, and say what the contract says.

Knows: random small scenes. Does not know: any backend.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_core_conformance.case import Failed
from vllm_core_conformance.inputs import REGIMES, fill, lay_out
from vllm_core_conformance.oracle import attention as vectorised
from vllm_core_conformance.oracle import attention_scalar as scalar
from vllm_core_conformance.score import judge
from vllm_core_conformance.steps import Scene, Shape
from vllm_core_conformance.target import round_to

SHAPES = {
    "plain": Shape(6, 2, 4, 4, 24, 16, 6, 6, 0.3),
    "window": Shape(3, 3, 4, 4, 24, 16, 6, 6, 0.4, window=6),
    "softcap": Shape(4, 1, 6, 4, 24, 16, 6, 6, 0.7, softcap=2.5, layers=2, layer=0),
    "sinks": Shape(4, 2, 4, 2, 40, 16, 6, 8, 0.5, sinks=True, window=5),
    "encoder": Shape(2, 2, 4, 4, 24, 16, 6, 6, 0.5, causal=False),
    "narrow values": Shape(2, 1, 4, 4, 24, 16, 6, 6, 0.5, dim_v=2),
}


def _scene(name: str, seed: int, regime: str = "normal", dtype: str = "float64") -> Scene:
    rng = np.random.default_rng(seed)
    shape = SHAPES[name]
    rows = [(int(rng.integers(0, 9)), 1), (0, 1), (int(rng.integers(1, 5)), 3), (0, 5)]
    layout = lay_out(shape, rng, rows, share=True)
    scene = fill(layout, rng, REGIMES[regime], lambda x: round_to(x, dtype), dtype)
    if scene.sinks is not None:
        scene.sinks = rng.normal(size=shape.num_q_heads)
    return scene


@pytest.mark.parametrize("name", SHAPES)
def test_scalar_and_vectorised_oracles_agree(name):
    for seed in range(8):
        regime = ("normal", "peaked", "flat", "outlier")[seed % 4]
        scene = _scene(name, seed, regime)
        found = vectorised.attention(scene, "bfloat16")
        out, lse = scalar.attention(scene)
        scale = max(1.0, float(np.abs(out).max()))
        assert np.abs(found.out - out).max() <= 1e-12 * scale
        assert np.abs(found.lse - lse).max() <= 1e-12 * max(1.0, float(np.abs(lse).max()))
        keys, values = scalar.cache_after(scene)
        assert np.array_equal(found.keys[1:], keys[1:])
        assert np.array_equal(found.values[1:], values[1:])


@pytest.mark.parametrize("name", SHAPES)
def test_noise_is_the_one_of_the_design_where_rounding_to_16_bits_outweighs_all(name):
    scene = _scene(name, 3)
    found, plain = vectorised.attention(scene, "bfloat16").noise, scalar.noise_16(scene)
    assert (found >= plain - 1e-12).all()
    assert np.median(found / plain) < 1.05


def test_two_tokens_by_hand():
    shape = Shape(1, 1, 2, 2, 4, 4, 2, 2, 0.5, num_rows=2, layers=1, layer=0)
    layout = lay_out(shape, np.random.default_rng(0), [(0, 2)])
    scene = fill(layout, np.random.default_rng(0), REGIMES["flat"], lambda x: x, "float64")
    scene.q[:] = [[[2.0, 0.0]], [[2.0, 0.0]]]
    scene.k[:] = [[[0.0, 5.0]], [[1.0, 0.0]]]
    scene.v[:] = [[[1.0, 0.0]], [[0.0, 1.0]]]
    found = vectorised.attention(scene, "float32")
    e = math.exp(1.0)  # scores 0 and 0.5 * 2 * 1
    assert np.allclose(found.out[0, 0], [1, 0], atol=1e-15)
    assert np.allclose(found.out[1, 0], [1 / (1 + e), e / (1 + e)], atol=1e-15)
    assert np.allclose(found.lse[:, 0], [0, math.log(1 + e)], atol=1e-15)


def test_nothing_that_no_query_sees_reaches_the_oracle():
    scene = _scene("window", 5)
    before = vectorised.attention(scene, "float32")
    shape, size = scene.shape, scene.shape.block_tokens
    assert shape.window is not None
    seen = np.zeros(scene.keys.shape[:3], bool)
    for row, table in enumerate(scene.tables):
        first = max(0, int(scene.cached[row]) - shape.window + 1)
        j = np.arange(first, int(scene.cached[row]))
        seen[table[j // size], shape.layer, j % size] = True
    scene.keys[~seen] = scene.values[~seen] = np.nan
    after = vectorised.attention(scene, "float32")
    assert np.array_equal(before.out, after.out)
    assert np.array_equal(before.noise, after.noise)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_of_16_bits_fail_class_a_and_those_of_32_bits_do_not(dtype):
    """The term for huge scores excuses float32, and nothing less."""
    rng = np.random.default_rng(1)
    shape = Shape(4, 1, 64, 8, 24, 16, 6, 12, 0.1)
    scene = fill(
        lay_out(shape, rng, [(70, 1), (30, 1), (5, 6)]),
        rng,
        REGIMES["huge"],
        lambda x: round_to(x, dtype),
        dtype,
    )
    for precision, declared, is_right in (
        ("float32", "A", True),
        (dtype, "A", False),
        (dtype, "B", True),
    ):
        expected = vectorised.attention(scene, dtype, declared)
        noise = {"dtype": dtype, "numeric_class": declared}
        out = round_to(_flash(scene, precision), dtype)
        try:
            judge("attention", out, expected.out, expected.noise, **noise)
        except Failed:
            assert not is_right, (precision, declared)
        else:
            assert is_right, (precision, declared)


def test_one_number_that_comes_often_is_no_habit_of_rounding():
    exact = np.full((3000, 4), 1 / 21)
    judge("attention", round_to(exact, "float16"), exact, 2 * exact, dtype="float16")


def _flash(scene: Scene, precision: str) -> np.ndarray:
    """Scores rounded to a precision, the rest in float64."""
    shape = scene.shape
    keys, values = vectorised.cache_after(scene)
    out = np.zeros((scene.num_tokens, shape.num_q_heads, shape.dim))
    for row in vectorised.rows_of(scene, keys, values):
        q = scene.q[row.begin : row.end]
        score = round_to(np.einsum("thd,jd->thj", q, row.keys[:, 0]) * shape.scale, precision)
        score = np.where(row.visible[:, None], score, -np.inf)
        p = np.exp(score - score.max(-1, keepdims=True))
        mean = np.einsum("thj,jd->thd", p, row.values[:, 0])
        out[row.begin : row.end] = mean / p.sum(-1, keepdims=True)
    return out
