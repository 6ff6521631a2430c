from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import (
    INT8_KV,
    AttentionPlan,
    AttentionSpec,
    KVFormat,
    KVGroup,
    OpenConfig,
    Program,
)
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import NUM_COLUMNS, BucketKey, DeviceState, StepInput, reference

pytest.importorskip("jax", reason="the attention of the jax binding was not checked")
from vllm_core.bindings.jax import JaxRuntime, open_runtime

Host = np.ndarray[Any, Any]
NUM_BLOCKS, LAYERS, LAYER = 64, 2, 1
TOKENS, ROWS = 48, 8
# (cached, new): decode, decode at a block's end, chunk behind a prefix, prefill, nothing, one token
MIX = ((33, 1), (15, 1), (21, 14), (0, 19), (5, 0), (0, 1))
DECODE = ((33, 1), (15, 1), (62, 1), (0, 1), (5, 0), (16, 1))


def opened(dtype: str) -> JaxRuntime:
    return open_runtime(OpenConfig(dtype, options={"platform": "cpu"}))


@pytest.fixture(scope="module")
def runtime() -> JaxRuntime:
    return opened("float32")


@dataclass
class Case:
    """Random keys, values and queries of one step, behind permuted block ids."""

    group_size: int = 3
    dim: int = 32
    num_kv: int = 2
    block: int = 16
    rows: tuple[tuple[int, int], ...] = MIX
    tokens: int = TOKENS
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)

        def draw(*shape: int) -> Host:
            drawn = rng.standard_normal(shape, np.float32)
            return drawn.astype(self.dtype).astype(np.float32)

        self.spec = AttentionSpec(
            num_q_heads=self.num_kv * self.group_size,
            num_kv_heads=self.num_kv,
            dim_qk=self.dim,
            dim_v=self.dim,
            scale=self.dim**-0.5,
            group=0,
            sinks=self.sinks,
            **({"kv": KVFormat(self.dtype)} | self.options),
        )
        self.group = KVGroup(
            id=0,
            kind="window" if self.spec.window else "full",
            block_tokens=self.block,
            layers=LAYERS,
            spec=self.spec,
            pool=0,
        )
        self.width = -(-64 // self.block)
        self.key = BucketKey(self.tokens, ROWS, (self.width,))
        self.keys = [draw(a + b, 2, self.num_kv, self.dim) for a, b in self.rows]
        self.q = draw(self.tokens, self.spec.num_q_heads, self.dim)
        self.sink = draw(self.spec.num_q_heads) if self.sinks else None
        self.lengths = [b for _, b in self.rows]
        free = rng.permutation(np.arange(1, NUM_BLOCKS)).tolist()
        self.tables = np.zeros((len(self.rows) + 1, self.width), np.int32)
        for row, (cached, new) in enumerate(self.rows):
            count = -(-(cached + new) // self.block)
            self.tables[row, :count] = [free.pop() for _ in range(count)]
        self._share_first_block()

    def _share_first_block(self) -> None:
        """Rows 0 and 2 have one prefix: the same block, held once."""
        size = self.block
        if min(self.rows[0][0], self.rows[2][0]) >= size:
            self.keys[2][:size] = self.keys[0][:size]
            self.tables[2, 0] = self.tables[0, 0]

    def cache(self, junk: float) -> Host:
        """What the cache holds before the step; everything else is junk."""
        shape = (NUM_BLOCKS, LAYERS, 2, self.block, self.num_kv, self.dim)
        cache = np.full(shape, junk, np.float32)
        for row, (cached, _) in enumerate(self.rows):
            j = np.arange(cached)
            at = self.tables[row, j // self.block], j % self.block
            cache[at[0], LAYER, :, at[1]] = self.keys[row][:cached]
        return cache

    def new(self, only: int | None = None) -> Host:
        """[T, 2, Hkv, D] keys and values of the step; padding is poison."""
        new = np.full((self.tokens, 2, self.num_kv, self.dim), np.nan, np.float32)
        rows = range(len(self.rows)) if only is None else [only]
        own = np.concatenate([self.keys[row][self.rows[row][0] :] for row in rows])
        new[: len(own)] = own
        return new

    def state(self, tables: Host | None = None) -> DeviceState:
        cached = np.array([a for a, _ in self.rows] + [0], np.int32)
        blank = np.zeros((len(cached), NUM_COLUMNS), np.int32)
        history, bias = np.zeros((1, 64), np.int32), np.zeros((1, 8), np.float32)
        tables = self.tables if tables is None else tables
        return DeviceState((tables,), cached, cached * 0, blank, history, bias)

    def step(self, only: int | None = None) -> StepInput:
        n = len(self.rows)
        row, start = np.full(ROWS, n, np.int32), np.zeros(ROWS + 1, np.int32)
        row[:n] = np.arange(n)
        lengths = [b if only in (None, r) else 0 for r, b in enumerate(self.lengths)]
        start[1 : n + 1], start[n + 1 :] = np.cumsum(lengths), sum(lengths)
        resets = np.zeros((1, 2 + NUM_COLUMNS), np.int32)
        resets[:, 0] = n
        changes, history = np.array([[n, 0, 0]], np.int32), np.zeros((1, 3), np.int32)
        tokens, logit_rows = np.zeros(self.tokens, np.int32), np.zeros((ROWS, 2), np.int32)
        split = np.zeros(3, np.int32)
        return StepInput(row, start, tokens, logit_rows, split, resets, (changes,), history)

    def expected(self) -> tuple[Host, Host]:
        """By the law, in float64, a row at a time."""
        out, lse, at = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf), 0
        for (cached, new), keys in zip(self.rows, self.keys):
            if not new:
                continue
            wide = keys.astype(np.float64)
            found = reference.attention(
                self.q[at : at + new].astype(np.float64),
                wide[:, 0],
                wide[:, 1],
                cached + np.arange(new),
                scale=self.spec.scale,
                causal=self.spec.causal,
                window=self.spec.window,
                softcap=self.spec.softcap,
                sinks=None if self.sink is None else self.sink.astype(np.float64),
            )
            out[at : at + new], lse[at : at + new] = found
            at += new
        return out, lse


class Attend:
    """The program of a case, compiled once; runs on any content of the cache."""

    def __init__(self, runtime: JaxRuntime, case: Case) -> None:
        self.runtime, self.case = runtime, case
        ops, tables = runtime.ops, runtime.block_tables

        def program(kv: Any, state: Any, step: Any, q: Any, new: Any, sink: Any) -> Any:
            view, state = ops.expand(tables, state, step, (case.block,), 8)
            plans = runtime.attention.plan(
                state, view, step, case.key, None, (case.spec,), (case.group,)
            )
            out, lse, kv = runtime.attention.attend(
                kv, LAYER, q, new[:, 0], new[:, 1], plans[0], sinks=sink, return_lse=sink is None
            )
            return kv, out, lse

        self.run = runtime.compile(Program("attend", program, consumes=(0,)), case.key)

    def __call__(
        self,
        junk: float = np.nan,
        only: int | None = None,
        q: Host | None = None,
        tables: Host | None = None,
    ) -> tuple[Any, Any, Any]:
        case = self.case
        attention, group, every = self.runtime.attention, case.group, range(NUM_BLOCKS)
        before = np.moveaxis(case.cache(junk), 1, 0)  # as exports are: [layer, block, ...]
        kv = attention.alloc([group], {0: NUM_BLOCKS})
        arrays = {"k": before[:, :, 0], "v": before[:, :, 1]}
        kv = attention.import_blocks(kv, group, every, arrays)
        q, new = case.q if q is None else q, case.new(only)
        q, new = q.astype(case.dtype), new.astype(case.dtype)
        kv, *found = self.run(kv, case.state(tables), case.step(only), q, new, case.sink)
        out, lse = self.runtime.fetch(tuple(found)).wait()
        arrays = attention.export_blocks(kv, group, every)
        after = np.stack((arrays["k"], arrays["v"]), 2)
        return np.moveaxis(after, 0, 1), out, lse


Programs = Callable[[str], Attend]

CASES: dict[str, dict[str, Any]] = {
    "group 3, dim 64": {"dim": 64},
    "group 7, dim 80": {"group_size": 7, "dim": 80},
    "group 1, sinks, a block wider than a chunk": {"group_size": 1, "block": 128, "sinks": True},
    "decode": {"rows": DECODE, "tokens": 8},
    "decode with window": {"rows": DECODE, "tokens": 8, "options": {"window": 5}},
    "window": {"block": 4, "options": {"window": 7}},
    "window and softcap": {"block": 4, "options": {"window": 40, "softcap": 2.0}},
    "bfloat16": {"dtype": "bfloat16"},
    "not causal, softcap": {"options": {"causal": False, "softcap": 0.5}},
}


@pytest.fixture(scope="module")
def program_of() -> Programs:
    """By name of the case; compiled once for all tests."""

    def program(name: str) -> Attend:
        case = Case(**CASES[name])
        return Attend(opened(case.dtype), case)

    return cache(program)


@pytest.mark.parametrize("name", CASES)
def test_a_ragged_mixed_step_equals_the_law(name: str, program_of: Programs) -> None:
    attend = program_of(name)
    case = attend.case
    _, out, lse = attend()
    want, want_lse = case.expected()
    step = 2.0**-8 if case.dtype == "bfloat16" else 0.0  # the output's own rounding
    np.testing.assert_allclose(out.astype(float), want, rtol=1e-5 + step, atol=3e-6)
    assert not out[sum(case.lengths) :].any()
    if case.sinks:
        assert lse is None
    else:
        assert lse.dtype == np.float32
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("name", ["group 3, dim 64", "window", "decode with window"])
def test_what_must_not_be_seen_changes_no_bit(name: str, program_of: Programs) -> None:
    attend = program_of(name)
    _, out, lse = attend(np.nan)
    for junk in (0.0, 1e30, -np.inf):
        _, again, again_lse = attend(junk)
        assert out.tobytes() == again.tobytes()
        assert lse.tobytes() == again_lse.tobytes()


def test_blocks_that_left_the_window_may_be_the_null_block(program_of: Programs) -> None:
    attend = program_of("window")
    _, out, _ = attend()
    freed = attend.case.tables.copy()
    for row, (cached, _) in enumerate(attend.case.rows):
        freed[row, : max(0, cached - 6) // 4] = 0
    assert (freed != attend.case.tables).any()
    _, again, _ = attend(tables=freed)
    assert out.tobytes() == again.tobytes()


def test_the_step_is_written_at_its_slots_and_nowhere_else(program_of: Programs) -> None:
    attend = program_of("group 3, dim 64")
    case = attend.case
    cache, _, _ = attend(junk=-3.0)
    want = case.cache(-3.0)
    for row, (cached, new) in enumerate(case.rows):
        for j in range(cached, cached + new):
            want[case.tables[row, j // 16], LAYER, :, j % 16] = case.keys[row][j]
    np.testing.assert_array_equal(cache[1:], want[1:])  # block 0 is the sink of padding


def test_a_row_does_not_depend_on_its_company(program_of: Programs) -> None:
    attend, at = program_of("group 3, dim 64"), 0
    case = attend.case
    _, together, _ = attend()
    for row, new in enumerate(case.lengths):
        query = np.zeros_like(case.q)
        query[:new] = case.q[at : at + new]
        _, out, _ = attend(only=row, q=query)
        assert out[:new].tobytes() == together[at : at + new].tobytes()
        at += new


def test_exported_blocks_can_be_imported_elsewhere(runtime: JaxRuntime) -> None:
    group, attention = Case().group, runtime.attention
    rng = np.random.default_rng(0)
    shape = (LAYERS, 3, 16, 2, 32)
    arrays = {n: rng.standard_normal(shape).astype(np.float32) for n in ("k", "v")}
    kv = attention.import_blocks(attention.alloc([group], {0: 8}), group, [5, 2, 7], arrays)
    found = attention.export_blocks(kv, group, [7, 5, 2])
    for name in ("k", "v"):
        np.testing.assert_array_equal(found[name], arrays[name][:, [2, 0, 1]])
    kv = attention.copy_blocks(kv, group, np.array([5, 0]), np.array([1, 0]))
    copied = attention.export_blocks(kv, group, [1])
    np.testing.assert_array_equal(copied["v"], arrays["v"][:, [0]])
    assert attention.block_bytes(group) * 8 == kv[0].nbytes


def test_an_old_cache_cannot_be_used_after_an_import(runtime: JaxRuntime) -> None:
    group, attention = Case().group, runtime.attention
    old = attention.alloc([group], {0: 4})
    arrays = attention.export_blocks(old, group, [1])
    attention.import_blocks(old, group, [2], arrays)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        attention.export_blocks(old, group, [2])


def test_what_the_binding_cannot_do_is_refused(runtime: JaxRuntime) -> None:
    case = Case(options={"alibi": True})
    with pytest.raises(NotSupported, match="ALiBi"):
        runtime.attention.alloc([case.group], {0: 4})
    with pytest.raises(NotSupported, match="one shape"):
        runtime.attention.alloc([Case().group, Case(block=4).group], {0: 4})
    for kv in (KVFormat("int8"), INT8_KV, KVFormat("float16"), KVFormat("float32", v_in_k=True)):
        with pytest.raises(NotSupported, match=f"a KV cache of {kv}; .* are of float32; use"):
            runtime.attention.alloc([Case(options={"kv": kv}).group], {0: 4})
    plan = AttentionPlan((), case.spec, case.group)
    with pytest.raises(InvalidArgument, match="sink"):
        runtime.attention.attend((), 0, None, None, None, plan, sinks=1, return_lse=True)
