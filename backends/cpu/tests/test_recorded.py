"""Walks that are recorded: the bits of a walk in Python, with whatever values the step has.

Knows: CpuOps, packed weights. Does not know: models, how calls are kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from vllm_core.ops import Param
from vllm_core_cpu import native, weights
from vllm_core_cpu.memory import Buffers
from vllm_core_cpu.ops import CpuOps
from vllm_core_cpu.recorded import WalkRecorder

HEADS, DIM, HIDDEN, WIDE, LAYERS = 2, 32, 64, 128, 3


class Spec(NamedTuple):
    kv_layer: int


class Counting:
    """Kernels that count their replays."""

    def __init__(self, kernels: native.Native) -> None:
        self._kernels, self.replays = kernels, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def replay(self, calls: int, count: int) -> None:
        self.replays += 1
        self._kernels.replay(calls, count)


class Bench:
    """Ops with a recorder, the same ops without, and the layers of a small decoder."""

    def __init__(self, kernels: native.Native, dtype: torch.dtype) -> None:
        device, empty = torch.device("cpu"), Buffers().empty
        self.kernels, self.dtype = Counting(kernels), dtype
        self.plain = CpuOps(kernels, empty, device, lambda: None)
        self.ops = CpuOps(self.kernels, empty, device, lambda: None)  # type: ignore[arg-type]
        self.ops.walks = WalkRecorder(self.kernels, self.ops)  # type: ignore[arg-type]
        self.specs = [Spec(i) for i in range(LAYERS)]
        self.rng = np.random.default_rng(7)

    def layers(self) -> list[dict[str, Param]]:
        return [
            {
                "norm": Param({"weight": torch.rand(HIDDEN) + 0.5}),
                "q": self.weight(HEADS * DIM, HIDDEN),
                "out": self.weight(HIDDEN, HEADS * DIM),
                "gate_up": self.weight(2 * WIDE, HIDDEN),
                "down": self.weight(HIDDEN, WIDE),
            }
            for _ in self.specs
        ]

    def weight(self, rows: int, size: int) -> Param:
        values = torch.from_numpy(self.rng.standard_normal((rows, size)).astype(np.float32) / 8)
        return Param(*weights.pack(self.kernels, [values.to(self.dtype)], None))  # type: ignore[arg-type]

    def values(self, tokens: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        x, cos, sin = (
            torch.from_numpy(self.rng.standard_normal((tokens, n)).astype(np.float32))
            for n in (HIDDEN, DIM // 2, DIM // 2)
        )
        return x.to(self.dtype), (cos, sin)

    def check(self, body: Any, params: Any, tokens: int) -> torch.Tensor:
        """One walk with new values, by both; -> its result."""
        x, table = self.values(tokens)
        wanted, _ = self.plain.layers(partial(body, self.plain), x, (), params, self.specs, table)
        before = x.clone()
        found, _ = self.ops.layers(partial(body, self.ops), x, (), params, self.specs, table)
        assert torch.equal(found, wanted)
        assert torch.equal(x, before)
        return found


def decoder(
    ops: CpuOps, x: Any, kv: Any, p: Any, spec: Spec, layer: int, cos: Any, sin: Any
) -> tuple[Any, Any]:
    tokens = len(x)
    h = ops.rms_norm(x, p["norm"], 1e-5)
    q = ops.rope(ops.linear(h, p["q"]).reshape(tokens, HEADS, DIM), cos, sin)
    h = ops.linear(q.reshape(tokens, HEADS * DIM), p["out"])
    h, x = ops.add_rms_norm(h, x, p["norm"], 1e-5)
    return x + ops.linear(ops.gated_linear(h, p["gate_up"], "silu"), p["down"]), kv


def with_an_op_of_torch(
    ops: CpuOps, x: Any, kv: Any, p: Any, spec: Spec, layer: int, cos: Any, sin: Any
) -> tuple[Any, Any]:
    x, kv = decoder(ops, x, kv, p, spec, layer, cos, sin)
    return torch.tanh(x), kv


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench(library: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    found = native.find(library)
    assert isinstance(found, native.Native)
    found.set_threads(2)
    with torch.inference_mode():
        yield Bench(found, request.param)
    found.set_threads(1)


def test_a_replay_gives_the_bits_of_a_walk_with_the_values_of_its_step(bench: Bench) -> None:
    params = bench.layers()
    results = []
    for tokens in (3, 3, 3, 1, 1, 1, 64, 64, 64, 3, 1, 3, 64, 65, 65, 65):
        found = bench.check(decoder, params, tokens)
        results.append((found, found.clone()))
    assert bench.kernels.replays >= 5
    for kept, copy in results:  # none was overwritten by a later walk
        assert torch.equal(kept, copy)


def test_a_walk_in_which_torch_computes_is_not_recorded(bench: Bench) -> None:
    params = bench.layers()
    for _ in range(5):
        bench.check(with_an_op_of_torch, params, 4)
    assert bench.kernels.replays == 0


def test_other_layers_have_a_recording_of_their_own(bench: Bench) -> None:
    first, second = bench.layers(), bench.layers()
    for params in (first, second, first, second, first, second, first, second):
        bench.check(decoder, params, 5)
    assert bench.kernels.replays >= 2


def test_recordings_let_parameters_go(bench: Bench) -> None:
    params = bench.layers()
    held = weakref.ref(params[0]["q"].arrays["packed"])
    for _ in range(4):
        bench.check(decoder, params, 2)
    assert bench.kernels.replays
    assert bench.ops.walks is not None
    bench.ops.walks.forget()
    del params
    assert held() is None
