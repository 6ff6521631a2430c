"""The two oracles of the ops agree: one in arrays, one in loops over Python floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_core.ops import NUM_COLUMNS, Column
from vllm_core_conformance.oracle import ops, ops_scalar
from vllm_core_conformance.oracle import stepping as rows_oracle
from vllm_core_conformance.target import numpy_dtype, round_to

TOLERANCE = 1e-12


def close(found: Any, want: Any, size: Any = 1.0) -> None:
    """Within 1e-12 of the size of what was added up."""
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape
    assert (np.abs(found - want) <= TOLERANCE * np.maximum(np.abs(size), 1e-300)).all()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def awkward(rng: np.random.Generator, rows: int, width: int) -> Any:
    x = rng.normal(size=(rows, width))
    x[1 % rows] *= 1000
    x[2 % rows] += 300
    x[-1] = 0
    return x


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (4, 130, 9)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_agrees(rng, shape, has_bias) -> None:
    tokens, width, out = shape
    x, w = awkward(rng, tokens, width), rng.normal(size=(out, width))
    b = rng.normal(size=out) if has_bias else None
    close(ops.linear(x, w, b), ops_scalar.linear(x, w, b), np.abs(x) @ np.abs(w).T + 1)


@pytest.mark.parametrize("width", [1, 5, 129])
def test_norms_agree(rng, width) -> None:
    x, w, b = awkward(rng, 6, width), rng.normal(size=width), rng.normal(size=width)
    for eps in (1e-5, 1e-12):
        want = [ops_scalar.rms_norm(row, w, eps) for row in x]
        close(ops.rms_norm(x, w, eps), want, 10 + np.abs(want))
        for bias in (b, None):
            want = [ops_scalar.layer_norm(row, w, bias, eps) for row in x]
            size = 1 + np.abs(x).mean(-1, keepdims=True) / np.sqrt(x.var(-1, keepdims=True) + eps)
            close(ops.layer_norm(x, w, bias, eps), want, 10 * size + np.abs(want))
    normed, total = ops.add_rms_norm(x, x[::-1], w, 1e-6)
    close(total, x + x[::-1])
    close(normed, ops.rms_norm(total, w, 1e-6))


def test_angles_agree_and_are_products_of_float32(rng) -> None:
    positions = np.array([0, 1, 131_071, 77_777], np.int32)
    frequency = (1e4 ** -(np.arange(24) / 24)).astype(np.float32)
    cos, sin = ops.rope_table(positions, frequency, 1.25)
    for t, position in enumerate(positions.tolist()):
        for i, f in enumerate(frequency.tolist()):
            angle = ops_scalar.rope_angle(position, f)
            close(cos[t, i], 1.25 * np.cos(angle))
            close(sin[t, i], 1.25 * np.sin(angle))


@pytest.mark.parametrize(("dim", "half"), [(2, 1), (10, 5), (10, 2)])
def test_rotations_agree(rng, dim, half) -> None:
    x = rng.normal(size=(4, 3, dim))
    cos, sin = rng.normal(size=(2, 4, half))
    want = [[ops_scalar.rope(head, cos[t], sin[t]) for head in x[t]] for t in range(4)]
    close(ops.rope(x, cos, sin), want, 10.0)


@pytest.mark.parametrize("kind", ops.KINDS)
def test_activations_agree(rng, kind) -> None:
    x = np.concatenate((rng.normal(size=200) * 3, np.linspace(-60, 60, 241), [0.0, 1e15, -300.0]))
    want = [ops_scalar.activation(float(v), kind) for v in x]
    close(ops.activation(x, kind), want, 1 + np.abs(x))
    both = rng.normal(size=(3, 14))
    close(ops.gated(both, kind), [ops_scalar.gated(row, kind) for row in both], 10.0)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_slopes_in_the_noise_are_those_of_the_function(rng, kind) -> None:
    x = rng.uniform(-6, 6, 500)
    step = 1e-6
    numeric = (ops.activation(x + step, kind) - ops.activation(x - step, kind)) / (2 * step)
    assert np.abs(ops._slope(x, kind) - numeric).max() < 1e-8


@pytest.mark.parametrize(("top_k", "renormalize"), [(1, True), (3, False), (7, True)])
def test_routes_agree(rng, top_k, renormalize) -> None:
    logits = np.round(rng.normal(size=(20, 7)) * 4) / 2
    valid = np.arange(20) < 16
    ids, shares = ops.moe_route(logits, top_k, renormalize, valid)
    for t in range(20):
        want = ops_scalar.moe_route(logits[t].tolist(), top_k, renormalize, bool(valid[t]))
        assert ids[t].tolist() == want[0]
        close(shares[t], want[1])


def test_experts_agree(rng) -> None:
    x, ids = rng.normal(size=(8, 6)), rng.integers(0, 5, (8, 2))  # 4 experts, so 4 is none
    ids[:, 1] = (ids[:, 0] + 1) % 5
    shares = rng.random((8, 2))
    w1, w2 = rng.normal(size=(4, 10, 6)), rng.normal(size=(4, 6, 5))
    want = [ops_scalar.moe_experts(x[t], ids[t], shares[t], w1, w2) for t in range(8)]
    close(ops.moe_experts(x, ids, shares, w1, w2), want, 100.0)


def test_log_probabilities_agree(rng) -> None:
    logits = np.round(rng.normal(size=(6, 40)) * 8) / 2
    logits[2] += 1e4
    targets = rng.integers(0, 40, 6)
    ids, values, rank, _ = ops.logprobs(logits, targets, 4)
    for r in range(6):
        row = logits[r].tolist()
        best = sorted(range(40), key=lambda i: (-row[i], i))[:4]
        assert ids[r].tolist() == [targets[r], *best]
        close(values[r], [ops_scalar.logprob(row, i) for i in ids[r]], 1e4)
        assert rank[r] == ops_scalar.rank(row, int(targets[r]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_noise_holds_an_honest_rounding_of_every_exact_result(rng, dtype) -> None:
    """What is computed exactly and rounded once lies within one unit of every noise model."""
    ratio = {"float32": 1.0, "bfloat16": 2.0**-16, "float16": 2.0**-13}[dtype]
    u = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    x, w = rng.normal(size=(9, 32)), rng.normal(size=32)
    square = rng.normal(size=(5, 32))
    for exact, noise in (
        (ops.linear(x, square), ops.noise_linear(x, square, ratio=ratio)),
        (ops.rms_norm(x, w, 1e-5), ops.noise_rms_norm(x, w, 1e-5, ratio=ratio)),
        (ops.layer_norm(x, w, w, 1e-5), ops.noise_layer_norm(x, w, w, 1e-5, ratio=ratio)),
        (ops.gated(x, "silu"), ops.noise_gated(x, "silu", ratio=ratio)),
        (ops.activation(x, "gelu"), ops.noise_activation(x, "gelu", ratio=ratio)),
    ):
        error = np.abs(round_to(exact, dtype) - exact)
        assert (error <= u * noise + 2.0**-24).all()
    assert numpy_dtype(dtype).itemsize == (4 if dtype == "float32" else 2)


def test_rows_of_a_step_follow_the_page_of_the_seam() -> None:
    """One step worked out by hand: a decoding row, a new row behind a hit, padding."""
    rows = rows_oracle.empty(3, (4,), 1, 20, NUM_COLUMNS)
    rows.num_tokens[1], rows.last_token[1] = 5, 42
    rows.tables[0][1] = [7, 9, 0, 0]
    rows.params[:, Column.HISTORY_SLOT] = 1
    params = [0] * NUM_COLUMNS
    step = {
        "row": np.array([1, 2, 3]),
        "query_start": np.array([0, 1, 3, 3]),
        "token_ids": np.array([-1, 11, 99, 0]),
        "resets": np.array([[2, 4, *params], [3, 0, *params]]),
        "table_changes0": np.array([[2, 1, 6], [3, 0, 0]]),
        "history_changes": np.array([[0, 3, 8], [1, 0, 0]]),
    }
    view = rows_oracle.expand(rows, step, (4,), 50)
    assert view.token_ids == [42, 11, 49]
    assert view.positions == [5, 4, 5]
    assert view.slots == [[9 * 4 + 1, 6 * 4, 6 * 4 + 1]]
    assert (view.sequence, view.row, view.seq_lens) == ([0, 1, 1], [1, 2, 2], [6, 6])
    assert rows.history[0, 3:6].tolist() == [8, 11, 49]
    rows_oracle.advance(rows, step, view, np.array([[5], [-1], [-1]]))
    assert rows.num_tokens.tolist()[1:3] == [6, 6]
    assert rows.last_token.tolist()[1:3] == [5, 0]
