"""Walks the layers of a model as scans, so that compile time does not grow with depth.

Layers whose specs repeat with some period (1: all alike; 2: window, full, window, full, ...) become
one run whose parameters are stacked; what does not repeat is called directly.

Knows: which layers are alike. Does not know: what a layer computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vllm_core.errors import InvalidArgument
from vllm_core.ops import Array
from vllm_core.ops.interface import LayerBody

_MAX_PERIOD = 8
"""Longest pattern that is looked for; every known model repeats within this."""


@dataclass(frozen=True)
class Run:
    """`repeats` times a pattern of `period` layers."""

    period: int
    repeats: int


@dataclass(frozen=True)
class StackedLayers:
    """Per run `period` trees, leaves [repeats, ...] where repeats is above 1. A pytree."""

    trees: tuple[tuple[Any, ...], ...]
    runs: tuple[Run, ...]


jax.tree_util.register_pytree_node(
    StackedLayers, lambda s: ((s.trees,), s.runs), lambda runs, trees: StackedLayers(trees[0], runs)
)


def stack(layers: Sequence[Any], specs: Sequence[Any]) -> StackedLayers:
    """Cuts the layers into runs and stacks each run's parameters."""
    if len(layers) != len(specs):
        raise InvalidArgument(f"{len(layers)} layers of parameters came with {len(specs)} specs")
    kinds = [(spec, _signature(layer)) for layer, spec in zip(layers, specs)]
    trees, runs, at = [], [], 0
    while at < len(layers):
        run = _longest_run(kinds[at:])
        trees.append(tuple(_stacked(layers[at : at + run.period * run.repeats], run)))
        runs.append(run)
        at += run.period * run.repeats
    return StackedLayers(tuple(trees), tuple(runs))


def walk(
    body: LayerBody, x: Array, kv: Any, params: StackedLayers, specs: Sequence[Any]
) -> tuple[Array, Any]:
    """Runs body over the layers in order; x and kv are the carry of each scan."""
    at = 0
    for trees, run in zip(params.trees, params.runs):
        own = specs[at : at + run.period * run.repeats]
        if run.repeats == 1:
            for tree, spec in zip(trees, own):
                x, kv = body(x, kv, tree, spec, spec.kv_layer)
        else:
            x, kv = _scan(body, x, kv, trees, own, run)
        at += len(own)
    return x, kv


def _scan(
    body: LayerBody, x: Array, kv: Any, trees: tuple[Any, ...], specs: Sequence[Any], run: Run
) -> tuple[Array, Any]:
    pattern = specs[: run.period]
    indices = [spec.kv_layer for spec in specs]
    kv_layers = jnp.asarray(indices, jnp.int32).reshape(run.repeats, run.period)

    def one_period(carry: tuple[Array, Any], item: tuple[Any, Array]) -> tuple[Any, None]:
        layers, index = item
        for place, (tree, spec) in enumerate(zip(layers, pattern)):
            carry = body(*carry, tree, spec, index[place])
        return carry, None

    carry, _ = lax.scan(one_period, (x, kv), (trees, kv_layers))
    found: tuple[Array, Any] = carry
    return found


def _signature(layer: Any) -> Any:
    """Equal for trees that can be stacked."""
    leaves, tree = jax.tree_util.tree_flatten(layer)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _longest_run(kinds: Sequence[Any]) -> Run:
    """The run from the start that covers most layers; the shortest period among those."""
    best = Run(1, 1)
    for period in range(1, min(_MAX_PERIOD, len(kinds) // 2) + 1):
        same = 0
        while period + same < len(kinds) and kinds[same] == kinds[period + same]:
            same += 1
        repeats = same // period + 1
        if repeats > 1 and period * repeats > best.period * best.repeats:
            best = Run(period, repeats)
    return best


def _stacked(layers: Sequence[Any], run: Run) -> list[Any]:
    if run.repeats == 1:
        return list(layers)
    return [
        jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *layers[place :: run.period])
        for place in range(run.period)
    ]
