"""The planted faults of ops, MoE, sampling, stepping and weights differ from what is right.

Each wrong backend and its honest base answer the same questions; a fault that never shows would be
no fault. Whether the suite's cases find it is the kill matrix's business.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vllm_core.backend import OpenConfig, StepLayout
from vllm_core.backend.step import scrap_params
from vllm_core.bindings.numpy import NumpyOps
from vllm_core.ops import (
    BucketKey,
    Changes,
    DeviceState,
    Features,
    LazyArray,
    Param,
    ParamSpec,
    Part,
)
from vllm_core.ops.step import NUM_COLUMNS, Column
from vllm_core_conformance.zoo.fault import Fault, all_faults
from vllm_core_conformance.zoo.faults.plain_sampler import PlainSampler
from vllm_core_conformance.zoo.faults.planted import opened_by

AREAS = ("ops", "moe", "sampling", "stepping", "weights")
FAULTS = [  # jax repeats mistakes of the others; calling its ops one by one takes minutes
    fault for fault in all_faults().values() if fault.area in AREAS and "_jax" not in fault.name
]
SLOTS, LENGTH, BIASES = 4, 40, 3


class Shown(Exception):
    """An answer differs from the right one."""


class Answers(list[Any]):
    """What was answered, compared with the right answers as it comes in."""

    def __init__(self, right: list[Any] | None = None) -> None:
        super().__init__()
        self.right = right

    def append(self, answer: Any) -> None:
        if self.right is not None and self.right[len(self)] != answer:
            raise Shown
        super().append(answer)


class Battery:
    """Asks a runtime everything, in one order, and keeps what it answers."""

    def __init__(self, runtime: Any, right: list[Any] | None = None) -> None:
        self.runtime, self.ops, self.dtype = runtime, runtime.ops, runtime.dtype
        self.rng = np.random.default_rng(5)
        self.seen = Answers(right)

    def keep(self, value: Any) -> None:
        if isinstance(value, Param):  # what unload makes of it counts
            return
        if value is None or isinstance(value, (int, float, str)):
            self.seen.append(value)
        elif isinstance(value, (tuple, list)):
            for x in value:
                self.keep(x)
        elif isinstance(value, dict):
            for name in sorted(value):
                self.keep(value[name])
        else:
            x = value if isinstance(value, np.ndarray) else np.asarray(self.ops.host(value))
            self.seen.append((str(x.dtype), x.shape, x.tobytes()))

    def ask(self, method: Any, *args: Any) -> Any:
        """The answer, and what became of the arguments."""
        try:
            with np.errstate(all="ignore"):
                found = method(*args)
        except Exception as error:
            self.seen.append(type(error).__name__)
            return None
        self.keep(found)
        self.keep([x for x in args if hasattr(x, "dtype")])
        return found

    def array(self, x: Any) -> Any:
        x = np.asarray(x)
        host = self.ops.asarray(x.astype(np.float32) if x.dtype.kind == "f" else x)
        return self.ops.cast(host, self.dtype) if x.dtype.kind == "f" else host

    def normal(self, *shape: int) -> Any:
        return self.array(self.rng.normal(size=shape))

    def param(self, role: str, *shape: int, bias: bool = False) -> Any:
        tensors = {"weight": self.rng.normal(size=shape).astype(np.float32) + 0.1}
        if bias:
            tensors["bias"] = self.rng.normal(size=shape[:1]).astype(np.float32)
        return self.runtime.load(ParamSpec("w", shape, role), [Part("dense", tensors, shape[0])])


def ask_ops(b: Battery) -> None:
    ops = b.ops
    for width in (72, 128):
        norm, both = b.param("norm", width), b.param("norm", width, bias=True)
        for x in (b.normal(35, width), b.array(1e-4 * b.rng.normal(size=(3, width)) + 3)):
            for eps in (1e-5, 1e-2):
                b.ask(ops.rms_norm, x, norm, eps)
                b.ask(ops.layer_norm, x, norm, eps)
                b.ask(ops.layer_norm, x, both, eps)
                b.ask(ops.add_rms_norm, x + 0, x * 2, norm, eps)
        b.ask(ops.rms_norm, b.normal(5, 3 * width)[:, :width], norm, 1e-5)
        b.ask(ops.rms_norm, b.normal(5, 3, width), norm, 1e-5)
    for x in (b.normal(6, 64), b.array(np.linspace(-120, 120, 640).reshape(5, 128))):
        for kind in ("relu", "gelu", "gelu_tanh", "silu"):
            b.ask(ops.activation, x + 0, kind)
        b.ask(ops.silu_and_mul, x + 0)
        b.ask(ops.gelu_and_mul, x + 0)
    b.ask(ops.silu_and_mul, b.normal(5, 128)[:, :64])
    b.ask(ops.activation, b.array(np.array([[np.nan, -3.9, 7.0]])), "relu")
    b.ask(ops.activation, b.array(np.array([[-3.9, -3.6]])), "gelu_tanh")
    for rows, width, out in ((1, 36, 50), (3, 300, 300), (35, 64, 16), (35, 64, 16)):
        for bias in (False, True):
            weight = b.param("linear", out, width, bias=bias)
            first = b.ask(ops.linear, b.normal(rows, width), weight)
            b.ask(ops.linear, b.normal(rows, width), weight)
            b.keep(first)
            b.ask(ops.linear, b.normal(rows, 2 * width)[:, :width], weight)
            b.ask(ops.linear, b.array(np.full((2, width), 70_000.0)), weight)
            b.ask(ops.logits, b.normal(rows, width), b.param("linear", 200, width, bias=bias))
    x = b.rng.normal(size=(4, 64))
    x[1] = np.nan
    b.ask(ops.linear, b.array(x), b.param("linear", 16, 64))
    b.ask(ops.logits, b.array(10 * x), b.param("linear", 16, 64))
    table = b.param("embedding", 40_000, 2)
    b.ask(ops.embed, b.array(np.array([0, 3, 39_999, 3], np.int32)), table)


def ask_sizes(b: Battery) -> None:
    """One token, more than 256, rows of more than 1,024 channels; and the product with its gate."""
    ops = b.ops
    for rows, width in ((1, 64), (300, 32), (3, 1200)):
        norm, x = b.param("norm", width), b.normal(rows, width)
        b.ask(ops.rms_norm, x, norm, 1e-5)
        b.ask(ops.add_rms_norm, x + 0, x * 2, norm, 1e-5)
        b.ask(ops.silu_and_mul, x + 0)
        b.ask(ops.gelu_and_mul, x + 0)
        for kind in ("silu", "gelu_tanh"):
            b.ask(ops.gated_linear, x, b.param("linear", 24, width), kind)
    ids = b.array(np.array([0, 4, 2], np.int32))
    b.ask(ops.embed, ids, b.param("embedding", 5, 1200))
    experts = b.param("experts", 4, 12, 8), b.param("experts", 4, 8, 6)
    routed = b.ask(ops.moe_route, b.normal(1, 4), 2, True, b.array(np.ones(1, bool)))
    b.ask(ops.moe_experts, b.normal(1, 8), *routed, *experts)


def ask_rope(b: Battery) -> None:
    frequency = (1e4 ** -(np.arange(16) / 16)).astype(np.float32)
    for first, scale in ((0, 1.0), (5000, 1.0), (40_000, 1.25)):
        positions = (first + b.rng.permutation(100)).astype(np.int32)
        for wave in (frequency, frequency / 3):
            cos, sin = b.ask(b.ops.rope_table, b.array(positions), wave, scale)
            for dim in (32, 48):
                b.ask(b.ops.rope, b.normal(100, 12, dim), cos, sin)
            b.ask(b.ops.rope, b.normal(100, 24, 32)[:, :12], cos, sin)


def ask_moe(b: Battery) -> None:
    for experts, top_k, tokens in ((8, 2, 9), (12, 4, 130)):
        gate, down = b.param("experts", experts, 32, 24), b.param("experts", experts, 24, 16)
        logits = np.round(b.rng.normal(size=(tokens, experts)) * 3, 1)
        logits[:, 5] -= 50
        logits[:, 2] += 6
        logits[0] = 0
        logits[1] += 200
        valid = b.array(np.arange(tokens) < tokens - 2)
        x = b.rng.normal(size=(tokens, 24))
        x[-1] = np.nan
        for renormalize in (False, True):
            args = (b.array(logits), top_k, renormalize, valid)
            b.ask(b.ops.moe_route, *args)
            ids, weights = opened_by(b.ops.name, OpenConfig(b.dtype)).ops.moe_route(*args)
            b.ask(b.ops.moe_experts, b.array(x), ids, weights, gate, down)


def ask_vocabulary(b: Battery) -> None:
    ops = b.ops
    single = ops.asarray(b.rng.normal(size=50).astype(np.float32))
    for dtype in ("bfloat16", "float16") if b.ops.name == "torch" else ():
        b.ask(ops.cast, single, dtype)
        b.ask(ops.cast, single * 1e39, dtype)
    index = (ops.asarray(np.array([1, 1, 2], np.int32)),)
    ones = ops.asarray(np.ones(3, np.float32))
    b.ask(ops.accumulate, ops.full((4,), 0.0, "float32"), index, ones)
    b.ask(ops.put, ops.full((4,), 0.0, "float32"), index, ones)
    ties = ops.asarray(np.array([[1, 3, 3, 2, 3]], np.float32))
    b.ask(ops.top, ties, 4)
    b.ask(ops.amax, ops.asarray(np.array([[1, np.nan]], np.float32)))
    b.ask(ops.words, ops.asarray(np.array([-1, 5], np.int32)))
    b.ask(ops.full, (2,), 1, "int32")
    b.ask(ops.repeat, 3, lambda x: x + 1, ops.full((2,), 0, "int32"))
    host = np.arange(4)
    device = ops.asarray(host)
    host[:] = 9
    b.keep(device)


def params_of(b: Battery, rows: int, vocab: int) -> Any:
    p = np.repeat(scrap_params(SLOTS, BIASES)[None], rows, 0)
    choices = {
        Column.TEMPERATURE: (0, 0.05, 0.6, 1, 2.5),
        Column.TOP_P: (1, 0.9, 0.5, 0.999),
        Column.MIN_P_GAP: (np.inf, 1, 3),
        Column.PRESENCE: (0, 0.5, -1),
        Column.FREQUENCY: (0, 0.3, -0.2),
        Column.REPETITION: (1, 1.3, 0.7),
    }
    for column, values in choices.items():
        p[:, column] = b.rng.choice(values, rows).astype(np.float32).view(np.int32)
    p[:, Column.TOP_K] = b.rng.choice((0, 0, 3, 70), rows)
    p[:, 7:9] = b.rng.integers(-(2**31), 2**31, (rows, 2))
    p[:, Column.SEQUENCE_INDEX] = b.rng.integers(0, 5, rows)
    p[:, Column.PROMPT_LEN] = b.rng.integers(0, 10, rows)
    p[:, Column.HISTORY_SLOT] = b.rng.integers(0, SLOTS + 1, rows)
    p[:, Column.BIAS_SLOT] = b.rng.integers(0, BIASES + 1, rows)
    p[:, Column.HELD_UNTIL] = b.rng.integers(0, 30, rows)
    p[:, Column.HELD_IDS : Column.HELD_IDS + 8] = b.rng.integers(-1, vocab, (rows, 8))
    return p


def drawing(b: Battery, rows: int, vocab: int, scale: float) -> tuple[Any, ...]:
    bias = b.rng.normal(size=(BIASES + 1, vocab)).astype(np.float32)
    bias[:, :3], bias[BIASES] = -np.inf, 0
    x = (b.rng.normal(size=(rows, vocab)) * scale).astype(np.float32)
    x[::3] = np.round(x[::3])
    positions = b.rng.integers(1, LENGTH, rows).astype(np.int32)
    positions[-2:] = 700, 1200
    history = b.rng.integers(0, min(vocab, 20), (SLOTS + 1, LENGTH)).astype(np.int32)
    history[0, 10:] = 5
    return x, params_of(b, rows, vocab), positions, history, bias


def ask_sampling(b: Battery) -> None:
    asarray = b.ops.asarray
    for vocab, scale, rows in ((515, 0.1, 60), (200, 3, 200), (100, 1, 400), (50, 20, 60)):
        for features in (
            Features(True, True, True, True),
            Features(True, True),
            Features(True),
            Features(penalties=True, bias=True),
        ):
            args = [asarray(x) for x in drawing(b, rows, vocab, scale)]
            tokens, _ = b.ask(b.ops.sample, *args, features)
            b.ask(b.ops.logprobs, args[0], tokens, 0)
            b.ask(b.ops.logprobs, args[0], tokens, 4)
    for vocab, rows in ((80_000, 40), *[(50, 3)] * 14):
        flat = drawing(b, rows, vocab, 0.01)
        b.ask(b.ops.sample, *map(asarray, flat), Features(True))
    x, *rest = drawing(b, 300, 500, 1)  # a tail of rare tokens that weigh something together
    x[:], x[:, 7], rest[0][:, Column.TEMPERATURE] = -11, 0, np.float32(1).view(np.int32)
    b.ask(b.ops.sample, *map(asarray, (x, *rest)), Features(True))
    x, *rest = drawing(b, 5, 64, 3)
    x[1, 3], x[3], x[4, 7] = np.nan, -np.inf, np.inf
    b.ask(b.ops.sample, *map(asarray, (x, *rest)), Features())
    boundary = np.zeros((1, 64), np.float32)
    params = scrap_params(SLOTS, BIASES)[None].copy()
    params[:, Column.TEMPERATURE] = np.float32(1).view(np.int32)
    params[:, Column.TOP_P] = np.float32(0.5).view(np.int32)
    for seed in range(40):  # the mass before the 33rd token is exactly half
        params[:, Column.SEED_LOW] = seed
        half = (boundary, params, np.array([5], np.int32), *rest[2:])
        b.ask(b.ops.sample, *map(asarray, half), Features(True, True))
    long = np.full((1, 64), -200, np.float32)
    b.ask(b.ops.logprobs, asarray(long), asarray(np.array([2], np.int32)), 2)
    b.ask(b.ops.logprobs, asarray(long + 400 * (np.arange(64) == 1)), asarray(np.zeros(1, int)), 2)


def state_of(b: Battery, rows: int, widths: tuple[int, ...]) -> DeviceState:
    tables = b.runtime.block_tables.alloc(rows, widths)
    blocks = b.rng.integers(1, 3_000_000, (rows + 1, max(widths))).astype(np.int32)
    changes = [
        (row, column, blocks[row, column]) for row in range(rows) for column in range(widths[0])
    ]
    packed = b.ops.asarray(np.array(changes, np.int32))
    tables = b.runtime.block_tables.apply(tables, (packed, packed + np.array([0, 0, 5], np.int32)))
    vocab = b.rng.integers(0, 50, (SLOTS + 1, LENGTH)).astype(np.int32)
    host = (
        b.rng.integers(0, 30, rows + 1).astype(np.int32),
        b.rng.integers(0, 50, rows + 1).astype(np.int32),
        np.repeat(scrap_params(SLOTS, BIASES)[None], rows + 1, 0),
        vocab,
        np.zeros((BIASES + 1, 50), np.float32),
    )
    return DeviceState(tables, *(b.ops.asarray(x) for x in host))


def ask_stepping(b: Battery) -> None:
    rows, real, sizes = 60, 40, (16, 8)
    key = BucketKey(200, 48, (12, 12))
    layout = StepLayout(key, rows, SLOTS, BIASES, sizes)
    buffer = layout.template().copy()
    v = layout.views(buffer)
    query = np.array([1] * 36 + [3, 20, 4, 19])
    v["row"][:real] = b.rng.permutation(rows)[:real]
    v["query_start"][1 : real + 1] = np.cumsum(query)
    v["query_start"][real + 1 :] = query.sum()
    v["token_ids"][: query.sum()] = b.rng.integers(-1, 60, query.sum())
    v["split"][:] = 36, 36, real
    resets = v["row"][10:20]
    v["resets"][:10, 0] = resets
    v["resets"][:10, 1] = [0, 31, 0, 40_000, 0, 5, 15, 0, 1, 7]
    v["resets"][:10, 2:] = b.rng.integers(-(2**31), 2**31, (10, NUM_COLUMNS))
    v["resets"][:10, 2 + Column.HISTORY_SLOT] = b.rng.integers(0, SLOTS, 10)
    for group in (0, 1):
        changes = v[f"table_changes{group}"]
        places = [(row, column) for row in v["row"][:real] for column in (0, 1, 2, 9)]
        count = min(len(changes), len(places)) - 1
        changes[:count, :2] = places[:count]
        changes[:count, 2] = b.rng.integers(1, 3_000_000, count)
    v["history_changes"][:30] = [(i % SLOTS, i, i % 7) for i in range(30)]
    step = layout.unpack(b.ops.asarray(buffer))
    state = state_of(b, rows, (12, 12))
    view, state = b.ask(b.ops.expand, b.runtime.block_tables, state, step, sizes, 50)
    drawn = b.rng.integers(0, 50, (48, 1)).astype(np.int32)
    drawn[5:9] = drawn[real:] = -1
    b.ask(b.ops.advance, state, step, view, b.ops.asarray(drawn))
    many = np.stack((np.arange(512) % rows, np.arange(512) // rows, np.arange(512)), 1)
    history = np.stack((np.arange(512) % SLOTS, np.arange(512) % LENGTH, np.arange(512)), 1)
    cells = b.ops.asarray(many.astype(np.int32))
    past = b.ops.asarray(history[:100].astype(np.int32))
    b.ask(b.ops.apply, b.runtime.block_tables, state, Changes((cells, cells), past))


def ask_weights(b: Battery) -> None:
    rng = b.rng

    def part(*shape: int, dtype: Any = np.float32, bias: bool = True) -> Part:
        tensors = {"weight": rng.normal(size=shape).astype(dtype)}
        if bias:
            tensors["bias"] = rng.normal(size=shape[:1]).astype(dtype)
        return Part("dense", tensors, shape[0])

    def load(name: str, role: str, shape: tuple[int, ...], *parts: Part) -> None:
        param = b.ask(b.runtime.load, ParamSpec(name, shape, role), parts)
        if param is None:
            return
        found = b.runtime.unload(param)
        b.keep({name: np.array(x, np.float32) for name, x in found.items()})
        b.seen.append([str(x.dtype) for x in found.values()])
        if b.ops.name == "numpy":  # where memory may be changed behind a runtime's back
            b.keep(param.arrays)
            for some in parts:
                for tensor in some.tensors.values():
                    if isinstance(tensor, np.ndarray):
                        tensor[...] = 0
            for x in found.values():
                x[...] = 1
        b.keep(b.runtime.unload(param)["weight"].astype(np.float32))

    load("fused", "linear", (24, 8), part(8, 8), part(8, 8), part(8, 8))
    load("square", "linear", (9, 9), part(9, 9))
    load("square", "linear", (9, 9), part(9, 9))
    half, brain = np.float16, ml_dtypes.bfloat16
    load("mixed", "linear", (16, 8), part(8, 8, dtype=half), part(8, 8, dtype=np.float32))
    load("brain", "linear", (8, 8), part(8, 8, dtype=brain))
    strided = Part("dense", {"weight": rng.normal(size=(8, 20)).astype(np.float32)[:, ::2]}, 8)
    load("strided", "linear", (8, 10), strided)
    for name in ("first", "second"):
        array = rng.normal(size=(6, 6)).astype(np.float32) * 1e-4
        lazy = LazyArray((6, 6), "float32", array.copy)
        load(name, "linear", (6, 6), Part("dense", {"weight": lazy}, 6))
    load("norm", "norm", (8,), part(8, bias=False))
    load("experts", "experts", (3, 8, 8), part(3, 8, 8, bias=False))
    load("embedding", "embedding", (7, 4), part(7, 4, bias=False))
    other = Part("int4", {"weight": np.zeros((2, 2), np.float32)}, 2)
    load("other", "linear", (2, 2), other)


QUESTIONS = {
    "ops": (ask_ops, ask_rope, ask_vocabulary, ask_sizes),
    "moe": (ask_moe,),
    "sampling": (ask_sampling,),
    "stepping": (ask_stepping,),
    "weights": (ask_weights,),
}


def answers(runtime: Any, area: str, right: list[Any] | None = None) -> list[Any]:
    battery = Battery(runtime, right)
    for question in QUESTIONS[area]:
        question(battery)
    return battery.seen


@cache
def right_answers(binding: str, dtype: str, area: str) -> list[Any]:
    return answers(opened_by(binding, OpenConfig(dtype)), area)


def shows(fault: Fault, binding: str, dtype: str) -> bool:
    right = right_answers(binding, dtype, fault.area)
    try:
        answers(fault.open(OpenConfig(dtype)), fault.area, right)
    except Exception:  # Shown, or it cannot even answer
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_shows(fault: Fault) -> None:
    binding = fault.open(OpenConfig("float32")).ops.name
    dtypes = ("float32",) if binding == "numpy" else ("bfloat16", "float32")
    assert any(shows(fault, binding, dtype) for dtype in dtypes)


def test_the_plain_sampler_is_the_reference_bit_for_bit() -> None:
    b = Battery(opened_by("numpy", OpenConfig("float32")))
    for vocab, scale in ((50, 20), (64, 0.1), (200, 3), (515, 1)):
        for features in (Features(True, True, True, True), Features(True, True), Features(True)):
            x, *rest = (*drawing(b, 30, vocab, scale), features)
            with np.errstate(all="ignore"):
                want = NumpyOps().sample(x, *rest)
                got = PlainSampler().sample(x, *rest)
            for a, c in zip(want, got, strict=True):
                np.testing.assert_array_equal(a, c)
