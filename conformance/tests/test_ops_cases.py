"""Cases of ops, weights, stepping and sampling: fixed shapes, no false alarm, sharp enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import OpenConfig, RectangleTables
from vllm_core.bindings.numpy import NumpyOps, NumpyRuntime, open_runtime
from vllm_core.ops import Column, Param
from vllm_core_conformance.cases import ops, ops_call, sampling, stepping, weights
from vllm_core_conformance.outcome import Result, execute
from vllm_core_conformance.score import limits_table
from vllm_core_conformance.target import Source, Target

MOST_PROGRAMS = 24
"""Of one op, on a backend that compiles one per shape."""
SLOW = ("sampling.draw.large", "sampling.draw.vocabulary", "ops.linear.wide")
CASES = (*ops.CASES, *weights.CASES, *stepping.CASES, *sampling.CASES)
BY_ID = {case.id: case for case in CASES}


def target_of(open: Callable[[OpenConfig], Any] = open_runtime) -> Target:
    return Target(Source("test", open), "float32")


@cache
def reference() -> Target:
    return target_of()


def run(case_id: str, target: Target, seed: int = 0) -> Result:
    return execute(BY_ID[case_id], target, seed)


def test_every_case_is_in_core_and_about_a_dozen_in_smoke() -> None:
    assert len(BY_ID) == len(CASES)
    assert all("core" in case.profiles for case in CASES)
    assert 10 <= sum("smoke" in case.profiles for case in CASES) <= 16


@pytest.mark.parametrize("case_id", [case.id for case in CASES if case.id not in SLOW])
def test_the_reference_passes(case_id) -> None:
    if not BY_ID[case_id].scored:
        pytest.skip("not scored: the page of the seam does not promise it")
    for seed in (0, 1):
        result = run(case_id, reference(), seed)
        assert result.status == "pass", result.sentence
        assert result.checks > 0


class Recorder(NumpyRuntime):
    """Notes which shapes every program is called with."""

    def __init__(self) -> None:
        super().__init__("float32")
        self.shapes: set[Any] = set()

    def compile(self, program, key):
        run = super().compile(program, key)

        def recorded(*args: Any) -> Any:
            self.shapes.add((id(program.fn), *_shapes(args)))
            return run(*args)

        return recorded


def _shapes(tree: Any) -> tuple[Any, ...]:
    if isinstance(tree, Param):
        tree = tuple(tree.arrays[name] for name in sorted(tree.arrays))
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return tuple(_shapes(x) for x in tree)
    return (np.shape(tree), getattr(tree, "dtype", None))


def test_shapes_do_not_depend_on_the_seed_and_are_few_per_op() -> None:
    runtime = Recorder()
    target = target_of(lambda config: runtime)
    per_op: dict[str, int] = defaultdict(int)
    for case in CASES:
        if case.id in SLOW:
            continue
        before = len(runtime.shapes)
        execute(case, target, 0)
        area, op, *_ = case.id.split(".")
        per_op[op if area == "ops" else area] += len(runtime.shapes) - before
        after = len(runtime.shapes)
        execute(case, target, 1)
        execute(case, target, 2)
        assert len(runtime.shapes) == after, f"{case.id}: another seed has other shapes"
    assert per_op["linear"] > 0
    assert {op: n for op, n in per_op.items() if n > MOST_PROGRAMS} == {}


def test_every_op_has_limits_and_16_bits_have_tighter_ones_where_they_show_less() -> None:
    table = limits_table()["limits"]
    for op in "linear rms_norm add_rms_norm layer_norm rope activation silu_and_mul".split():
        assert table[f"{op}/16"][1] <= table[op][1]
    assert "moe_experts" in table and "logprobs" in table


# ---------------------------------------------------------------- planted faults
def wrong_ops(**methods: Any) -> Target:
    """The reference with methods of its op table replaced."""

    def open_wrong(config: OpenConfig) -> NumpyRuntime:
        runtime = NumpyRuntime("float32")
        runtime.ops = type("Wrong", (NumpyOps,), methods)()
        runtime.block_tables = RectangleTables(runtime.ops)
        return runtime

    return target_of(open_wrong)


def mutating(self, x, param, eps):
    found = NumpyOps.rms_norm(self, x, param, eps)
    x *= 2
    return found


def seed_high_ignored(self, logits, params, *rest):
    params = params.copy()
    params[:, Column.SEED_HIGH] = 0
    return NumpyOps.sample(self, logits, params, *rest)


def top_k_one_more(self, logits, params, *rest):
    params = params.copy()
    params[:, Column.TOP_K] += params[:, Column.TOP_K] > 0
    return NumpyOps.sample(self, logits, params, *rest)


def eps_outside(self, x, param, eps):
    return x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + np.float32(eps)) * param["weight"]


def residual_kept(self, x, residual, param, eps):
    return self.rms_norm(x + residual, param, eps), residual


def last_is_ignored(self, state, step, view, tokens):
    return NumpyOps.advance(self, state, step, view, np.where(tokens == 0, -1, tokens))


def truncated(self, x, dtype):
    if x.dtype == np.int32 and dtype == "float32":
        return (x & ~0xFF).astype(np.float32)
    return NumpyOps.cast(self, x, dtype)


FAULTS = (
    ("ops.rms_norm.shapes", {"rms_norm": mutating}, "changed its input"),
    ("ops.rms_norm.shapes", {"rms_norm": eps_outside}, "rms_norm"),
    ("ops.add_rms_norm.residual", {"add_rms_norm": residual_kept}, "residual_sum"),
    ("ops.rows.poison", {"add_rms_norm": residual_kept}, "residual_sum"),
    ("ops.vocabulary.casts", {"cast": truncated}, "cast of int32 to float32"),
    ("sampling.seeds.words", {"sample": seed_high_ignored}, "high word of the seed were ignored"),
    ("sampling.filters.ties", {"sample": top_k_one_more}, "top-k kept one token more"),
    ("stepping.step.lives", {"advance": last_is_ignored}, "last_token"),
)


@pytest.mark.parametrize(("case_id", "methods", "words"), FAULTS)
def test_a_planted_fault_fails_and_is_named(case_id, methods, words) -> None:
    target = wrong_ops(**methods)
    for seed in (0, 1, 2):
        result = run(case_id, target, seed)
        assert result.status == "fail"
        assert words in result.sentence


def test_one_nan_in_a_result_fails() -> None:
    def silu_and_mul(self, x):
        found = NumpyOps.silu_and_mul(self, x)
        found[-1, -1] = np.nan
        return found

    result = run("ops.silu_and_mul.gates", wrong_ops(silu_and_mul=silu_and_mul))
    assert result.status == "fail"
    assert "got nan" in result.sentence


def test_a_result_in_another_dtype_fails() -> None:
    def rms_norm(self, x, param, eps):
        return NumpyOps.rms_norm(self, x, param, eps).astype(np.float64)

    result = run("ops.rms_norm.shapes", wrong_ops(rms_norm=rms_norm))
    assert result.status == "fail"
    assert "promised is float32" in result.sentence


def test_rows_of_regimes_hold_every_regime_whatever_the_seed() -> None:
    for seed in range(5):
        x = ops_call.regimes(np.random.default_rng(seed), 8, 64, "float32")
        assert (np.abs(x).max(-1) == 0).sum() == 1
        assert ((np.abs(x.mean(-1)) > 900) & (x.std(-1) < 10)).sum() == 1
        assert (x.std(-1) > 1e5).sum() == 1  # beyond float16
        assert (np.abs(x).max(-1) < 1e-38).sum() == 2  # zeros and denormals
