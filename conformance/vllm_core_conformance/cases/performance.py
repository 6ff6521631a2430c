"""Cases: speed, never scored. Each figure stands beside what the device itself can do.

A device's memory rate and its rate of multiplying are measured through the seam, in the same way;
the rest is given as a share of them. Medians of several runs behind a warm-up, a fetch as the
barrier.

Knows: bytes and operations of an op. Does not know: what is fast.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import AttentionSpec, KVFormat, StepLayout
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.steps import Scene, Shape, Stage
from vllm_core_conformance.target import Target, calling, numpy_dtype

Numbers = NDArray[Any]
Body = Callable[[Target, np.random.Generator], Evidence]

LEAST, MOST, SECONDS = 3, 15, 0.6
"""Runs of one figure: at least, at most, and for about how long."""
COPIED = 1 << 24
"""Elements of float32: more than caches hold."""
SIDE = 2048
"""Of the square weight that 256 rows meet; one row meets four times as much."""


def _median(once: Callable[[], None]) -> float:
    """Seconds of one run."""
    once()
    once()
    found: list[float] = []
    while len(found) < LEAST or (len(found) < MOST and sum(found) < SECONDS):
        begin = time.perf_counter()
        once()
        found.append(time.perf_counter() - begin)
    return float(np.median(found))


def _run(target: Target, tag: str, fn: Callable[..., tuple[Any, ...]], *args: Any) -> float:
    """fn's last result is small: its fetch is the barrier."""
    run = target.compile(("performance", tag), fn, num_results=2)

    def once() -> None:
        with calling(tag):
            results = run(*args)
        target.fetch((results[-1],))

    return _median(once)


def _rates(target: Target, rng: np.random.Generator) -> tuple[float, float]:
    """Bytes per second of x + 1, read and written, and of a maximum, read only: where allocating
    the result is slow, the latter is nearer to what the memory can do."""
    if "rates" not in target.memo:
        host = rng.random((1 << 10, COPIED >> 10), np.float32)
        x, ops = target.array(host, "float32"), target.ops

        def copy(x: Any) -> tuple[Any, ...]:
            y = x + 1.0
            return y, y[:1, :1] * 2.0

        def read(x: Any) -> tuple[Any, ...]:
            y = ops.amax(x)
            return y, y[:1] * 2.0

        target.memo["rates"] = (
            8 * COPIED / _run(target, "copy", copy, x),
            4 * COPIED / _run(target, "maximum", read, x),
        )
    found: tuple[float, float] = target.memo["rates"]
    return found


def _memory_rate(target: Target, rng: np.random.Generator) -> float:
    return max(_rates(target, rng))


def _square(target: Target, rng: np.random.Generator, rows: int, side: int) -> float:
    """Seconds of `rows` times a square weight."""
    weight = target.round(rng.standard_normal((side, side), np.float32) / np.sqrt(side))
    param = target.param("linear", {"weight": weight})
    x = target.array(target.round(rng.standard_normal((rows, side), np.float32)))

    def fn(x: Any, p: Any) -> tuple[Any, ...]:
        y = target.ops.linear(x, p)
        return y, y[:1, :1] * 2.0

    return _run(target, f"linear {rows}", fn, x, param)


def _matmul_rate(target: Target, rng: np.random.Generator) -> float:
    """Operations per second."""
    if "matmul" not in target.memo:
        target.memo["matmul"] = 2 * 256 * SIDE * SIDE / _square(target, rng, 256, SIDE)
    return float(target.memo["matmul"])


def memory(target: Target, rng: np.random.Generator) -> Evidence:
    """x + 1 and a maximum over 64 MiB."""
    copied, read = _rates(target, rng)
    return _figures({"x + 1, GB/s": copied / 1e9, "maximum, GB/s": read / 1e9})


def matmul(target: Target, rng: np.random.Generator) -> Evidence:
    """256 rows times a square weight of 2048."""
    return _figures({"linear of 256 rows, GFLOP/s": _matmul_rate(target, rng) / 1e9})


def linear_one_row(target: Target, rng: np.random.Generator) -> Evidence:
    """One row times a weight of 4096 x 4096: the weight's bytes over the time."""
    side = 2 * SIDE
    seconds = _square(target, rng, 1, side)
    rate = side * side * numpy_dtype(target.dtype).itemsize / seconds
    return _figures(
        {
            "linear of 1 row, GB/s of weight": rate / 1e9,
            "linear of 1 row, share of the memory rate": rate / _memory_rate(target, rng),
        }
    )


class _Timed(Stage):
    """A stage that plays one step over and over, without looking at the cache."""

    def seconds(self, scene: Scene) -> float:
        key = self.key(scene)
        layout = StepLayout(
            key, self.shape.rows_for_life, 0, 0, (self.shape.block_tokens,) * len(self.groups)
        )
        device_step = self._upload(scene, layout)
        arrays = [
            self.target.array(self._padded(x, scene, key.tokens))
            for x in (scene.q, scene.k, scene.v)
        ]
        run = self.target.compile(
            ("performance", self.shape, key),
            self._program(layout),
            name="step",
            consumes=(0, 1),
            num_results=3,
            key=key,
        )

        def once() -> None:
            with calling("attention"):
                results = run(self.state, self.kv, device_step, *arrays)
            self.state, self.kv = results[:2]
            self.target.fetch((results[-1],))

        return _median(once)


def _attention(target: Target, rng: np.random.Generator, length: int, rows: int) -> _Timed:
    """A stage for `rows` sequences of up to `length` tokens, its cache filled."""
    spec = AttentionSpec(8, 4, 128, 128, 0.09, KVFormat(target.dtype), group=0)
    size = target.usual_block(spec)
    width = -(-length // size)
    shape = Shape(
        num_q_heads=8,
        num_kv_heads=4,
        dim=128,
        block_tokens=size,
        num_blocks=1 + rows * width,
        tokens=rows if rows > 1 else length,
        rows=rows,
        width=width,
        scale=0.09,
        layers=1,
        layer=0,
    )
    return _Timed(target, shape)


def _scene(
    target: Target, stage: Stage, rng: np.random.Generator, cached: int, query: int
) -> Scene:
    shape = stage.shape
    heads = (shape.num_blocks, shape.layers, shape.block_tokens, shape.num_kv_heads, shape.dim)
    total, n = shape.rows * query, shape.rows

    def normal(*size: int) -> Numbers:
        return target.round(rng.standard_normal(size, np.float32))

    return Scene(
        shape,
        state_rows=np.arange(n),
        cached=np.full(n, cached),
        query=np.full(n, query),
        tables=1 + rng.permutation(n * shape.width).reshape(n, shape.width).astype(np.int32),
        keys=normal(*heads),
        values=normal(*heads),
        q=normal(total, shape.num_q_heads, shape.dim),
        k=normal(total, shape.num_kv_heads, shape.dim),
        v=normal(total, shape.num_kv_heads, shape.dim),
        exact_shapes=True,
    )


def decode(target: Target, rng: np.random.Generator) -> Evidence:
    """8 rows of 1024 tokens: bytes of K and V over the time."""
    rows = min(8, target.constraints().max_tokens or 8)
    stage = _attention(target, rng, 1024, rows)
    scene = _scene(target, stage, rng, 1023, 1)
    stage.write_cache(scene)
    elements = 2 * rows * 1024 * stage.shape.num_kv_heads * stage.shape.dim
    rate = elements * numpy_dtype(target.dtype).itemsize / stage.seconds(scene)
    return _figures(
        {
            "decode attention, GB/s of K and V": rate / 1e9,
            "decode attention, share of the memory rate": rate / _memory_rate(target, rng),
        }
    )


def prefill(target: Target, rng: np.random.Generator) -> Evidence:
    """One prompt of 512 tokens: operations of q K and p V where they are visible."""
    length = min(512, target.constraints().max_tokens or 512)
    stage = _attention(target, rng, length, 1)
    scene = _scene(target, stage, rng, 0, length)
    operations = 4 * stage.shape.num_q_heads * stage.shape.dim * length * (length + 1) / 2
    rate = operations / stage.seconds(scene)
    return _figures(
        {
            "prefill attention, GFLOP/s": rate / 1e9,
            "prefill attention, share of the linear rate": rate / _matmul_rate(target, rng),
        }
    )


def _figures(figures: dict[str, float]) -> Evidence:
    for name, value in figures.items():
        require(bool(np.isfinite(value)) and value > 0, f"{name} came out as {value}")
    return Evidence(checks=len(figures), figures=figures)


def _case(name: str, says: str, body: Body) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        return body(
            target, np.random.default_rng([seed, zlib.crc32(f"performance.{name}".encode())])
        )

    return Case(
        f"performance.{name}", says, run, frozenset({"performance"}), every_dtype=True, scored=False
    )


CASES: tuple[Case, ...] = (
    _case("memory", "the device's own memory rate", memory),
    _case("matmul", "the device's own rate of multiplying", matmul),
    _case("linear_one_row", "a matrix product of one row, against the memory rate",
          linear_one_row),
    _case("decode", "decoding attention, against the memory rate", decode),
    _case("prefill", "prefill attention, against the rate of multiplying", prefill),
)  # fmt: skip
