"""Attention cases let the reference backend pass, and name what a planted mistake did.

Knows: the reference backend and small mistakes in it. Does not know: the zoo.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import StepConstraints
from vllm_core.bindings.numpy import NumpyAttention, NumpyRuntime, open_runtime
from vllm_core_conformance.cases import attention, kv
from vllm_core_conformance.cases.attention_shapes import RECIPES, batches, mixture, shape_of
from vllm_core_conformance.coded import code
from vllm_core_conformance.inputs import lay_out, random
from vllm_core_conformance.oracle.attention import attention as oracle
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.target import Source, Target

CASES = {case.id: case for case in attention.CASES + kv.CASES}


@pytest.fixture(scope="module")
def reference():
    return Target(Source("reference", open_runtime), "float32")


def _wrong(attention_class):
    def open_wrong(config):
        runtime = NumpyRuntime("float32")
        runtime.attention = attention_class("float32")
        return runtime

    return Target(Source("wrong", open_wrong), "float32")


def _sentences(target, *cases):
    results = [execute(CASES[case], target, 3) for case in cases]
    assert all(r.status == "fail" for r in results), [(r.case, r.status) for r in results]
    return [r.sentence for r in results]


@pytest.mark.parametrize("case", [c for c in CASES if "very_long" not in c])
def test_reference_passes(reference, case):
    result = execute(CASES[case], reference, 1)
    assert result.status == "pass", result.sentence
    assert result.checks > 0


def test_static_backend_compiles_few_programs(reference):
    shapes = {replace(shape_of(reference, name), layers=0) for name in RECIPES}
    assert len(shapes) <= 20


@pytest.mark.parametrize("name", ["mixed", "window", "window_short", "largest_block"])
def test_coded_answers_are_those_of_the_oracle(reference, name):
    for seed in range(3):
        rng = random(seed, "test")
        (rows,) = batches(reference, mixture(reference, name, rng))
        coded = code(lay_out(shape_of(reference, name), rng, rows, share=True), rng)
        assert np.abs(oracle(coded.scene, "float32").out - coded.answers).max() < 1e-12
        assert len(coded.named()) >= coded.after[..., 0].size


def test_steps_obey_declared_limits(reference):
    limits = StepConstraints(mixed_ok=False, max_prefills=2, chunk_multiple=8, max_tokens=20)
    target: Any = SimpleNamespace(constraints=lambda: limits)
    steps = batches(target, [(5, 1), (13, 30), (0, 9), (7, 1), (9, 2), (0, 8)])
    for rows in steps:
        queries = [query for _, query in rows]
        assert sum(queries) <= 20
        assert sum(query > 1 for query in queries) <= 2
        assert len({query > 1 for query in queries}) == 1
        assert all(cached % 8 == 0 for cached, query in rows if query > 1)
    assert sum(map(len, steps)) == 6


class BlockBoundary(NumpyAttention):
    """Reads the first slot of each block one too early, when the row decodes."""

    def attend(self, kv, layer, q, k, v, plan, **more):
        size = plan.group.block_tokens
        slots, tables, *rest = plan.arrays
        cache = self._view(kv, plan.group)
        cache[slots // size, layer, 0, slots % size] = k
        cache[slots // size, layer, 1, slots % size] = v
        wrong = cache.copy()
        for row, length in zip(tables, rest[1]):
            for column in range(1, -(-int(length) // size)):
                wrong[row[column], layer, :, 0] = cache[row[column - 1], layer, :, size - 1]
        first = slots % size == 0
        k, v = (
            np.where(first[:, None, None], wrong[slots // size, layer, 0, 0], k),
            np.where(first[:, None, None], wrong[slots // size, layer, 1, 0], v),
        )
        out, lse, _ = super().attend(_pools(kv, plan, wrong), layer, q, k, v, plan, **more)
        return out, lse, kv


def _pools(kv, plan, cache):
    pools = list(kv)
    pools[plan.group.pool] = cache.reshape(kv[plan.group.pool].shape)
    return tuple(pools)


def test_off_by_one_at_a_block_boundary_is_called_so():
    (sentence,) = _sentences(_wrong(BlockBoundary), "attention.coded.mixed")
    assert re.match(
        r"query \d+ head \d+ \(kv head \d+\) returned token (\d+) of sequence \d+ "
        r"\(block \d+ slot 15\); expected token (\d+) \(block \d+ slot 0\): "
        r"off by one at a block boundary \(\d+ of \d+ answers are wrong\)",
        sentence,
    ), sentence


class WriteAfter(NumpyAttention):
    """The step's K and V come too late: what the slots held before is read."""

    def attend(self, kv, layer, q, k, v, plan, **more):
        size = plan.group.block_tokens
        slots = plan.arrays[0]
        old = self._view(kv, plan.group).copy()
        _, _, new = super().attend(kv, layer, q, k, v, plan, **more)
        before = _pools(kv, plan, old)
        stale = old[slots // size, layer, :, slots % size]
        out, lse, _ = super().attend(before, layer, q, stale[:, 0], stale[:, 1], plan, **more)
        return out, lse, new


class WiderWindow(NumpyAttention):
    def attend(self, kv, layer, q, k, v, plan, **more):
        if plan.spec.window is not None:
            plan = replace(plan, spec=replace(plan.spec, window=plan.spec.window + 1))
        return super().attend(kv, layer, q, k, v, plan, **more)


class LeaksPadding(NumpyAttention):
    """0 times what no query sees is added."""

    def attend(self, kv, layer, q, k, v, plan, **more):
        out, lse, kv = super().attend(kv, layer, q, k, v, plan, **more)
        size = plan.group.block_tokens
        cache = self._view(kv, plan.group)
        begin = 0
        for row, length in enumerate(plan.arrays[3]):
            end = plan.arrays[2][row + 1]
            if end > begin and length % size:
                last = plan.arrays[1][row, length // size]
                out[begin:end] += 0 * cache[last, layer, 1, -1, 0, 0]
            begin = end
        return out, lse, kv


class CopiesKeysOnly(NumpyAttention):
    def copy_blocks(self, kv, group, src, dst):
        view = self._view(kv, group)
        view[dst, :, 0] = view[src, :, 0]
        return kv


def test_stale_slots_are_told():
    (sentence,) = _sentences(_wrong(WriteAfter), "attention.coded.mixed")
    assert "before the step wrote it" in sentence


def test_a_token_outside_the_window_is_told():
    coded, counted = _sentences(
        _wrong(WiderWindow), "attention.coded.window", "attention.count.window"
    )
    assert "outside the window of 21, by 1" in coded
    assert re.search(r"counted 22 tokens instead of 21|counted \d+ tokens instead of", counted)


def test_poison_that_leaks_is_told():
    (sentence,) = _sentences(_wrong(LeaksPadding), "attention.poison.mixed")
    assert sentence.startswith("NaN in what the step must not look at changed its output")


def test_half_copied_block_is_found_twice():
    copied, moved = _sentences(_wrong(CopiesKeysOnly), "kv.copy", "kv.copied")
    assert copied.startswith("copy of blocks")
    assert "answers are wrong" in moved
