from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import OpenConfig
from vllm_core.bindings.numpy import NumpyOps
from vllm_core.ops import Ops, Param

jax = pytest.importorskip("jax", reason="layers as scans were not checked")
from vllm_core.bindings.jax import open_runtime  # noqa: E402


@dataclass(frozen=True)
class LayerSpec:
    window: int | None
    kv_layer: int = field(compare=False)


def specs_of(windows: list[int | None]) -> list[LayerSpec]:
    """kv_layer counts the layers of each kind on its own, as KV groups do."""
    return [LayerSpec(w, windows[:i].count(w)) for i, w in enumerate(windows)]


def body(ops: Any) -> Any:
    def layer(x: Any, kv: Any, params: Any, spec: LayerSpec, index: Any) -> Any:
        (value, calls), group = x, 0 if spec.window is None else 1
        value = value * 3 + params["p"]["weight"] * (1 if spec.window is None else 5)
        places = ops.arange(1) * 0 + index
        kv = tuple(ops.put(k, (places,), value[:1]) if g == group else k for g, k in enumerate(kv))
        return (value, calls + 1), kv

    return layer


def run(ops: Any, windows: list[int | None]) -> tuple[Any, Any]:
    """Whole numbers only, so that the order of operations cannot show."""
    specs = specs_of(windows)
    weights = [np.arange(4, dtype=np.int32) + 10 * i for i in range(len(specs))]
    layers = [{"p": Param({"weight": ops.asarray(w)})} for w in weights]
    params = ops.stack_layers(layers, specs)
    kv = tuple(ops.asarray(np.zeros(len(specs), np.int32)) for _ in range(2))
    x = ops.asarray(np.ones(4, np.int32)), ops.asarray(np.zeros((), np.int32))
    found: tuple[Any, Any] = ops.layers(body(ops), x, kv, params, specs)
    return found


PATTERNS: dict[str, list[int | None]] = {
    "all alike": [None] * 6,
    "one": [None],
    "alternating": [4, None] * 3,
    "five and one, cut short": [4, 4, 4, 4, 4, None] * 2 + [4, 4],
    "no pattern": [None, 4, 4, None, None, 4],
}


@pytest.fixture(scope="module")
def ops() -> Ops:
    return open_runtime(OpenConfig("auto", options={"platform": "cpu"})).ops


@pytest.mark.parametrize("name", PATTERNS)
def test_a_scan_over_layers_equals_the_loop(name: str, ops: Ops) -> None:
    found, expected = run(ops, PATTERNS[name]), run(NumpyOps(), PATTERNS[name])
    jax.tree_util.tree_map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("all alike", [(1, 6)]),
        ("one", [(1, 1)]),
        ("alternating", [(2, 3)]),
        ("five and one, cut short", [(6, 2), (1, 2)]),
        ("no pattern", [(1, 1), (1, 2), (1, 2), (1, 1)]),
    ],
)
def test_layers_are_cut_into_the_longest_repeating_runs(
    name: str, runs: list[tuple[int, int]], ops: Ops
) -> None:
    specs = specs_of(PATTERNS[name])
    layers = [{"p": Param({"weight": ops.full((2,), 1.0, "float32")})} for _ in specs]
    found = [(run.period, run.repeats) for run in ops.stack_layers(layers, specs).runs]
    assert found == runs


def test_layers_with_other_parameters_are_not_stacked_together(ops: Ops) -> None:
    def layer(**sizes: int) -> Any:
        return Param({name: ops.full((size,), 1.0, "float32") for name, size in sizes.items()})

    layers = [layer(weight=2), layer(weight=2), layer(weight=2, bias=1), layer(weight=3)]
    stacked = ops.stack_layers(layers, specs_of([None] * 4))
    assert [(run.period, run.repeats) for run in stacked.runs] == [(1, 2), (1, 1), (1, 1)]
    assert stacked.trees[0][0]["weight"].shape == (2, 2)


def test_compile_time_does_not_grow_with_depth(ops: Ops) -> None:
    calls = 0

    def counted(x: Any, kv: Any, params: Any, spec: Any, index: Any) -> Any:
        nonlocal calls
        calls += 1
        return x, kv

    specs = specs_of([4, None] * 20)
    params = ops.stack_layers([ops.full((1,), i, "float32") for i in range(40)], specs)
    ops.layers(counted, ops.arange(2), (), params, specs)
    assert calls == 2
