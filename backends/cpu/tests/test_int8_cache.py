"""Caches in int8: what is stored is the law's, what is read is what is stored, however tokens come.

Knows: the law in vllm_core.ops.quantized_kv, CpuAttention. Does not know: layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_core.backend import INT8_KV, AttentionPlan, AttentionSpec, HostStep, KVFormat, KVGroup
from vllm_core.bindings.torch.convert import from_host
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import BucketKey, HostArray, Param, reference
from vllm_core.ops.quantized_kv import dequantize_kv, quantize_kv
from vllm_core_cpu import native, weights
from vllm_core_cpu.attention import CpuAttention
from vllm_core_cpu.ops import CpuOps
from vllm_core_cpu.recorded import WalkRecorder

LAYERS, LAYER, BLOCKS = 2, 1, 40
DTYPES = ("float32", "bfloat16")


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "neon_bf16"])
def kernels(
    library: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> native.Native:
    best = native.find(library)
    assert isinstance(best, native.Native)
    if request.param not in best.usable:
        pytest.skip(f"NOT CHECKED on {request.param}: this processor or build lacks it")
    monkeypatch.setenv("VLLM_CORE_CPU_ISA", request.param)
    found = native.find(library)
    assert isinstance(found, native.Native)
    found.set_threads(1)
    return found


def empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@dataclass
class Row:
    """Tokens of one sequence, all that there will ever be, and the blocks that they get."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: list[int]


class Bench:
    """One cache, and sequences that come into it in steps."""

    def __init__(
        self,
        kernels: native.Native,
        dtype: str,
        dims: tuple[int, int] = (64, 64),
        heads: tuple[int, int] = (6, 2),
        kv: KVFormat = INT8_KV,
        **rules: Any,
    ) -> None:
        self.attention = CpuAttention(kernels, empty, dtype, lambda: None)
        self.dtype = self.attention.dtype
        self.spec = AttentionSpec(*heads, *dims, dims[0] ** -0.5, kv, 0, **rules)
        self.group = KVGroup(0, "full", 32, LAYERS, self.spec, 0)
        self.kv = self.attention.alloc((self.group,), {0: BLOCKS})
        self.rng = np.random.default_rng(5)

    def row(self, length: int, first_block: int) -> Row:
        q, k, v = (
            torch.from_numpy(self.rng.standard_normal((length, *size)).astype(np.float32))
            for size in (
                (self.spec.num_q_heads, self.spec.dim_qk),
                (self.spec.num_kv_heads, self.spec.dim_qk),
                (self.spec.num_kv_heads, self.spec.dim_v),
            )
        )
        blocks = [first_block + i for i in range(-(-length // 32))]
        return Row(q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), blocks)

    def plan(self, parts: list[tuple[Row, int, int]]) -> AttentionPlan:
        """parts: (sequence, its tokens from, to) of each row of the step."""

        class Facts:
            def __init__(self, **facts: Any) -> None:
                self.__dict__.update(facts)

        width = max(len(row.blocks) for row, _, _ in parts)
        tables = torch.zeros(len(parts), width, dtype=torch.int32)
        for i, (row, _, _) in enumerate(parts):
            tables[i, : len(row.blocks)] = torch.tensor(row.blocks)
        lengths = np.array([to for _, _, to in parts])
        counts = np.array([to - begin for _, begin, to in parts])
        key = BucketKey(int(counts.sum()), len(parts), (width,))
        host = HostStep(counts, lengths, (0, 0, len(parts)))
        step: Any = Facts(
            query_start=torch.tensor([0, *np.cumsum(counts)]), row=torch.arange(len(parts))
        )
        view: Any = Facts(seq_lens=torch.from_numpy(lengths), token_ids=range(counts.sum()))
        state: Any = Facts(tables=(tables,))
        host_part = self.attention.plan_host(host, key)
        found = self.attention.plan(state, view, step, key, host_part, (self.spec,), (self.group,))
        return found[0]

    def step(self, *parts: tuple[Row, int, int], **more: Any) -> list[torch.Tensor]:
        """-> the outputs of each row."""
        q, k, v = (
            torch.cat([getattr(row, name)[begin:to] for row, begin, to in parts]) for name in "qkv"
        )
        plan = self.plan(list(parts))
        out, _, self.kv = self.attention.attend(self.kv, LAYER, q, k, v, plan, **more)
        return list(out.split([to - begin for _, begin, to in parts]))

    def stored(self, row: Row, length: int) -> dict[str, HostArray]:
        """What the cache holds of the row's tokens: [tokens, heads(, dim)]."""
        arrays = self.attention.export_blocks(self.kv, self.group, row.blocks)
        return {name: x[LAYER].reshape(-1, *x.shape[3:])[:length] for name, x in arrays.items()}


def law(x: torch.Tensor) -> tuple[HostArray, HostArray]:
    return quantize_kv(x.float().numpy())


@pytest.mark.parametrize("dims", [(64, 64), (5, 33), (72, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_is_the_law_to_the_bit(
    kernels: native.Native, dtype: str, dims: tuple[int, int]
) -> None:
    bench = Bench(kernels, dtype, dims)
    row = bench.row(150, 3)
    for x in (row.k, row.v):
        x[3, 0] = 0
        x[4, 0] *= 1e-42 if dtype == "float32" else 1e-37
        x[5, 0] *= 1e30
        x[6, 0, 1] = float("nan")
        x[7, 0, 2] = float("-inf")
        x[8, 0] = torch.arange(x.shape[-1]) % 255 / 2  # between codes
        x[8, 0, 0] = 127
    bench.step((row, 0, 70))
    bench.step((row, 70, 149))
    bench.step((row, 149, 150))
    found = bench.stored(row, 150)
    for name, x in (("k", row.k), ("v", row.v)):
        codes, scales = law(x)
        np.testing.assert_array_equal(found[name], codes)
        np.testing.assert_array_equal(found[f"{name}_scale"], scales)
        assert found[name].dtype == np.int8 and found[f"{name}_scale"].dtype == np.float32


RULES: dict[str, Any] = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 2.0},
    "not causal": {"causal": False},
    "sinks": {"sinks": True},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_formula_on_what_is_stored(
    kernels: native.Native, dtype: str, name: str
) -> None:
    bench = Bench(kernels, dtype, (40, 24), **RULES[name])
    rows = [bench.row(n, 1 + 5 * i) for i, n in enumerate((131, 64, 7))]
    bench.step((rows[0], 0, 130), (rows[1], 0, 45))
    sinks = torch.linspace(-1, 2, 6) if bench.spec.sinks else None
    parts = ((rows[0], 130, 131), (rows[1], 45, 64), (rows[2], 0, 7))
    for found, (row, begin, to) in zip(bench.step(*parts, sinks=sinks), parts, strict=True):
        k, v = (dequantize_kv(*law(x[:to])) for x in (row.k, row.v))
        expected, _ = reference.attention(
            row.q[begin:to].double().numpy(), k, v, np.arange(begin, to), scale=bench.spec.scale,
            causal=bench.spec.causal, window=bench.spec.window, softcap=bench.spec.softcap,
            sinks=None if sinks is None else sinks.numpy(),
        )  # fmt: skip
        allowed = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_bits_however_its_tokens_come(
    kernels: native.Native, dtype: str
) -> None:
    """On one thread; on more, units are cut where the other rows of a step have it."""
    bench = Bench(kernels, dtype)
    row, other = bench.row(130, 1), bench.row(97, 10)
    (whole,) = bench.step((row, 0, 130))
    for cuts in ((0, 64, 130), (0, 33, 34, 35, 101, 130), (0, 129, 130)):
        fresh = Row(row.q, row.k, row.v, [20 + i for i in range(len(row.blocks))])
        found = [bench.step((other, 0, 97), (fresh, a, b))[1] for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_no_number_touches_those_that_see_it_and_nobody_else(
    kernels: native.Native, dtype: str
) -> None:
    bench = Bench(kernels, dtype, window=40)
    clean, row = bench.row(64, 1), bench.row(90, 5)
    (expected,) = bench.step((clean, 0, 64))
    (before,) = bench.step((row, 0, 90))
    for x in (row.k, row.v):
        spoiled = x.clone()
        x[10, 1, 3] = float("inf")
        beside, found = bench.step((clean, 0, 64), (row, 0, 90))
        assert torch.equal(beside, expected)
        sees, head = slice(10, 50), slice(3, 6)  # of the second KV head
        assert found[sees, head].isnan().all()
        found[sees, head] = before[sees, head]
        assert torch.equal(found, before)
        x.copy_(spoiled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_go_out_and_in_and_are_copied_with_their_scales(
    kernels: native.Native, dtype: str
) -> None:
    bench, other = Bench(kernels, dtype, (10, 24)), Bench(kernels, dtype, (10, 24))
    row = bench.row(64, 3)
    bench.step((row, 0, 64))
    arrays = bench.attention.export_blocks(bench.kv, bench.group, [3, 4])
    assert {n: (x.dtype, x.shape) for n, x in arrays.items()} == {
        "k": (np.int8, (LAYERS, 2, 32, 2, 10)),
        "v": (np.int8, (LAYERS, 2, 32, 2, 24)),
        "k_scale": (np.float32, (LAYERS, 2, 32, 2)),
        "v_scale": (np.float32, (LAYERS, 2, 32, 2)),
    }
    other.kv = other.attention.import_blocks(other.kv, other.group, [9, 7], arrays)
    source, target = torch.tensor([9, 7, 0]), torch.tensor([1, 2, 0])
    other.kv = other.attention.copy_blocks(other.kv, other.group, source, target)
    again = other.attention.export_blocks(other.kv, other.group, [1, 2])
    for name, x in arrays.items():
        np.testing.assert_array_equal(again[name], x)
    torch.testing.assert_close(other.kv[0][1], bench.kv[0][3])
    query = Row(row.q, row.k, row.v, [1, 2])
    assert torch.equal(other.step((query, 63, 64))[0], bench.step((row, 63, 64))[0])


def test_only_what_such_a_cache_exports_is_imported(kernels: native.Native) -> None:
    coded, dense = Bench(kernels, "float32"), Bench(kernels, "float32", kv=KVFormat("float32"))
    codes, values = (
        bench.attention.export_blocks(bench.kv, bench.group, [3, 4]) for bench in (coded, dense)
    )
    wide = {name: x.astype(np.float32) for name, x in codes.items()}
    ints = {name: x.astype(np.int8) for name, x in values.items()}
    wrong: list[tuple[Bench, dict[str, HostArray], str]] = [
        (coded, {"k": codes["k"], "v": codes["v"]}, "k_scale, v_scale"),
        (coded, values, "k_scale, v_scale"),
        (coded, wide, "k must be int8"),
        (coded, codes | {"k_scale": codes["k_scale"].astype(np.float64)}, "k_scale must be float3"),
        (coded, codes | {"v": codes["v"].reshape(LAYERS, 2, 64, 1, 64)}, r"v must be .* 32, 2, 64"),
        (coded, {name: x[:, :1] for name, x in codes.items()}, r"k must be int8 \[2, 2, 32"),
        (dense, codes, "k_scale"),
        (dense, ints, "k must be float32"),
        (dense, {"k": values["k"]}, "k, v"),
    ]
    for bench, arrays, said in wrong:
        before = bench.kv[0].clone()
        with pytest.raises(InvalidArgument, match=f"{said}.*same layout_fingerprint"):
            bench.attention.import_blocks(bench.kv, bench.group, [9, 7], arrays)
        assert torch.equal(bench.kv[0], before)


def test_a_block_counts_codes_and_scales_and_names_its_format(kernels: native.Native) -> None:
    coded, dense = (Bench(kernels, "bfloat16", kv=kv) for kv in (INT8_KV, KVFormat("bfloat16")))
    tokens_and_heads = LAYERS * 32 * 2
    assert coded.attention.block_bytes(coded.group) == tokens_and_heads * (64 + 64 + 8)
    assert dense.attention.block_bytes(dense.group) == tokens_and_heads * (64 + 64) * 2
    assert coded.kv[0].nbytes == BLOCKS * coded.attention.block_bytes(coded.group)
    names = {
        bench.attention.layout_fingerprint(bench.group)
        for bench in (coded, dense, Bench(kernels, "float32"))
    }
    assert len(names) == 3  # codes of float32 stand in another order
    with pytest.raises(InvalidArgument, match="one size and dtype"):
        coded.attention.alloc((coded.group, dense.group), {0: BLOCKS})


@pytest.mark.parametrize(
    "kv",
    [KVFormat("int8"), KVFormat("bfloat16", scales=True), KVFormat("float32")]
    + [KVFormat("int8", scales=True, v_in_k=True)],
)
def test_a_format_that_is_not_declared_is_refused(kernels: native.Native, kv: KVFormat) -> None:
    with pytest.raises(NotSupported, match="are of bfloat16 or int8 with scales; use"):
        Bench(kernels, "bfloat16", kv=kv)


class Counting:
    """Kernels that count their replays."""

    def __init__(self, kernels: native.Native) -> None:
        self._kernels, self.replays = kernels, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def replay(self, calls: int, count: int) -> None:
        self.replays += 1
        self._kernels.replay(calls, count)


@dataclass(frozen=True)
class Layer:
    kv_layer: int


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_walk_writes_and_reads_codes(kernels: native.Native, dtype: str) -> None:
    counting: Any = Counting(kernels)
    specs, hidden = [Layer(i) for i in range(LAYERS)], 6 * 64
    plain, recorded = Bench(kernels, dtype), Bench(counting, dtype)
    plain_ops = CpuOps(kernels, empty, torch.device("cpu"), lambda: None)
    ops = CpuOps(counting, empty, torch.device("cpu"), lambda: None)
    ops.walks = WalkRecorder(counting, ops, recorded.attention)

    def weight(rows: int) -> Param:
        values = torch.from_numpy(plain.rng.standard_normal((rows, hidden)).astype(np.float32) / 20)
        return Param(*weights.pack(kernels, [values.to(plain.dtype)], None))

    params = [{"qkv": weight(hidden + 4 * 64), "out": weight(hidden)} for _ in specs]

    def body(
        bench: Bench, ops: CpuOps, x: Any, kv: Any, p: Any, spec: Layer, layer: int, plan: Any
    ) -> tuple[Any, Any]:
        heads = ops.linear(x, p["qkv"]).reshape(len(x), 10, 64)
        q, k, v = heads[:, :6], heads[:, 6:8], heads[:, 8:]
        out, _, kv = bench.attention.attend(kv, layer, q, k, v, plan)
        return x + ops.linear(out.reshape(len(x), hidden), p["out"]), kv

    row = plain.row(40, 2)
    bodies = [partial(body, plain, plain_ops), partial(body, recorded, ops)]
    for at in range(40):
        x = from_host(plain.rng.standard_normal((1, hidden)).astype(np.float32)).to(plain.dtype)
        with torch.inference_mode():
            found = [
                own.layers(walk, x, bench.kv, params, specs, (bench.plan([(row, at, at + 1)]),))[0]
                for bench, own, walk in zip(
                    (plain, recorded), (plain_ops, ops), bodies, strict=True
                )
            ]
        assert torch.equal(*found)
    assert counting.replays > 30
    assert torch.equal(plain.kv[0], recorded.kv[0])
