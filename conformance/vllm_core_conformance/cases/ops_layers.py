"""Cases: walking the layers of a model, and the counted loop.

Each layer's parameter is a permutation of ids, looked up by `embed`: the ids that come out tell the
order of the layers exactly.

Knows: patterns of layers. Does not know: how a backend stacks or scans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases.ops_call import Bench, rng_of
from vllm_core_conformance.target import Target, calling

IDS, TOKENS = 61, 9
"""Ids below 128 are exact in every dtype."""


@dataclass(frozen=True)
class Layer:
    """kv_layer counts the layers of each kind on its own, as KV groups do."""

    kind: int
    extra: bool
    """Has a second parameter: a tree of another form."""
    kv_layer: int = field(compare=False)


PATTERNS: dict[str, str] = {
    "all alike": "aaaaa",
    "one": "b",
    "alternating, cut short": "ababa",
    "no pattern": "abbcac",
    "five and one, twice, cut short": "aaaaabaaaaabaa",
}
"""a: kind 0; b: kind 1; c: kind 1 with a second parameter."""


def _specs(pattern: str) -> list[Layer]:
    kinds = [int(letter != "a") for letter in pattern]
    return [
        Layer(kind, letter == "c", kinds[:place].count(kind))
        for place, (kind, letter) in enumerate(zip(kinds, pattern))
    ]


def _body(ops: Ops) -> Any:
    def body(x: Any, kv: Any, params: Any, spec: Layer, layer: Any) -> tuple[Any, Any]:
        ids, calls = x
        ids = ops.cast(ops.embed(ids, params["turn"])[:, 0], "int32")
        if spec.extra:
            ids = ops.cast(ops.embed(ids, params["again"])[:, 0], "int32")
        ids = (ids + 3 * spec.kind) % IDS
        place = ops.arange(1) * 0 + layer
        kv = tuple(
            ops.put(k, (place,), ids[None]) if group == spec.kind else k
            for group, k in enumerate(kv)
        )
        return (ids, calls + 1), kv

    return body


def walk(target: Target, seed: int) -> Evidence:
    rng, bench, ops = rng_of("ops.layers.order", seed), Bench(target), target.ops
    for name, pattern in PATTERNS.items():
        specs = _specs(pattern)
        turns = [(rng.permutation(IDS), rng.permutation(IDS)) for _ in specs]
        layers = []
        for spec, pair in zip(specs, turns):
            names = ("turn", "again") if spec.extra else ("turn",)
            layers.append(
                {
                    which: target.param("embedding", {"weight": turn[:, None]}, f"{name}.{which}")
                    for which, turn in zip(names, pair)
                }
            )
        with calling("stack_layers"):
            params = ops.stack_layers(layers, specs)
        start = rng.integers(0, IDS, TOKENS).astype(np.int32)

        def fn(x: Any, params: Any, specs: list[Layer] = specs) -> tuple[Any, ...]:
            kv = tuple(ops.full((len(specs), TOKENS), -1, "int32") for _ in range(2))
            (ids, calls), kv = ops.layers(
                _body(ops), (x, ops.full((), 0, "int32")), kv, params, specs
            )
            return ids, calls, *kv

        found = target.call(("ops", "layers", name), fn, target.array(start), params)
        _compare(bench, name, specs, turns, start, found)
    return bench.done()


def _compare(
    bench: Bench, name: str, specs: list[Layer], turns: Any, ids: Any, found: tuple[Any, ...]
) -> None:
    kv = np.full((2, len(specs), TOKENS), -1)
    for spec, (turn, again) in zip(specs, turns):
        ids = turn[ids]
        if spec.extra:
            ids = again[ids]
        ids = (ids + 3 * spec.kind) % IDS
        kv[spec.kind, spec.kv_layer] = ids
    require(
        int(found[1]) == len(specs),
        f"layers ({name}): the body ran {int(found[1])} times for {len(specs)} layers",
    )
    for kind in range(2):
        what = f"layers ({name}): what each layer wrote into its place of KV group {kind}"
        bench.equal(found[2 + kind], kv[kind], what, axes=("layer of the group", "token"))
    bench.equal(found[0], ids, f"layers ({name}): x behind the last layer", axes=("token",))


def repeat(target: Target, seed: int) -> Evidence:
    """The body runs exactly `count` times on a tree of arrays."""
    rng, bench, ops = rng_of("ops.repeat.count", seed), Bench(target), target.ops

    def step(carry: Any) -> Any:
        a, (b, n) = carry
        return (b * 3 + a) & 0xFFFF, (a, n + 1)

    for count in (0, 1, 10, 32):

        def fn(a: Any, b: Any, count: int = count) -> tuple[Any, ...]:
            x, (y, n) = ops.repeat(count, step, (a, (b, ops.full((), 0, "int32"))))
            return x, y, n

        a, b = (rng.integers(0, 1000, 7).astype(np.int32) for _ in range(2))
        found = target.call(("ops", "repeat", count), fn, target.array(a), target.array(b))
        want: Any = (a, (b, 0))
        for _ in range(count):
            want = step(want)
        for out, exact in zip(found, (want[0], want[1][0], np.int32(want[1][1]))):
            bench.equal(out, exact, f"repeat {count} times", axes=("element",) * np.ndim(exact))
    return bench.done()


CASES: tuple[Case, ...] = (
    Case(
        "ops.layers.order",
        "runs every layer once, in order, with its own parameters, its own place in its KV group",
        walk,
        frozenset({"core"}),
    ),
    Case(
        "ops.repeat.count",
        "repeats a body exactly as often as asked, on a tree of arrays",
        repeat,
        frozenset({"core"}),
    ),
)
