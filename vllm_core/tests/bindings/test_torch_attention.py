from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import AttentionSpec, HostStep, KVFormat, KVGroup
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import NUM_COLUMNS, BucketKey, DeviceState, StepInput, reference

torch = pytest.importorskip("torch", reason="the attention of the torch binding was not checked")
from vllm_core.bindings.torch import BagAttention, TorchAttention, TorchOps  # noqa: E402
from vllm_core.bindings.torch import attention as attention_module  # noqa: E402
from vllm_core.bindings.torch.attention import split_classes  # noqa: E402
from vllm_core.ops import RectangleTables  # noqa: E402

Host = np.ndarray[Any, Any]
CPU = torch.device("cpu")
OPS = TorchOps(CPU)
NUM_BLOCKS, LAYERS, LAYER = 400, 2, 1
# (cached, new) of each row: those that decode, then the others
DECODE = ((33, 1), (15, 1), (62, 1), (0, 1), (16, 1), (150, 1))
MIX = (*DECODE[:3], (21, 14), (0, 19), (32, 3), (47, 16))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class SdpaAttention(TorchAttention):
    """What devices other than the CPU run."""

    def __init__(self, device: Any, dtype: str) -> None:
        super().__init__(device, dtype)
        self.multiplies = False


@dataclass
class Case:
    """Keys, values and queries of one step, behind permuted blocks, some of them shared."""

    group_size: int = 3
    dim: int = 32
    num_kv: int = 2
    block: int = 16
    rows: tuple[tuple[int, int], ...] = MIX
    padding: int = 3
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(11)
        heads = self.num_kv * self.group_size
        self.spec = AttentionSpec(
            num_q_heads=heads,
            num_kv_heads=self.num_kv,
            dim_qk=self.dim,
            dim_v=self.dim,
            scale=self.dim**-0.5,
            kv=KVFormat(self.dtype),
            group=0,
            sinks=self.sinks,
            **self.options,
        )
        self.group = KVGroup(0, "full", self.block, LAYERS, self.spec, 0)
        self.query_len = np.array([new for _, new in self.rows])
        self.seq_len = np.array([cached + new for cached, new in self.rows])
        self.total = int(self.query_len.sum())
        self.tokens = self.total + self.padding
        self.width = -(-int(self.seq_len.max()) // self.block) + 1
        self.key = BucketKey(self.tokens, len(self.rows) + 1, (self.width,))
        self.keys = [
            self.rounded(rng.standard_normal((n, 2, self.num_kv, self.dim))) for n in self.seq_len
        ]
        self.q = self.rounded(rng.standard_normal((self.tokens, heads, self.dim)))
        self.sink = rng.standard_normal(heads) if self.sinks else None
        free = rng.permutation(np.arange(1, NUM_BLOCKS)).tolist()
        self.tables = np.zeros((len(self.rows) + 1, self.width), np.int32)
        for row, length in enumerate(self.seq_len):
            count = -(-int(length) // self.block)
            self.tables[row, :count] = [free.pop() for _ in range(count)]
            if self.options.get("window"):  # blocks that left the window are somebody else's
                gone = max(0, self.rows[row][0] + 1 - self.options["window"]) // self.block
                self.tables[row, :gone] = 0
        shared = min(self.rows[0][0], self.rows[2][0]) // self.block
        self.keys[2][: shared * self.block] = self.keys[0][: shared * self.block]
        self.tables[2, :shared] = self.tables[0, :shared]

    def rounded(self, x: Host) -> Host:
        """As the dtype holds it, in float64."""
        rounded: Host = torch.from_numpy(x).to(getattr(torch, self.dtype)).double().numpy()
        return rounded

    def tensor(self, x: Host) -> Any:
        return torch.from_numpy(x).to(getattr(torch, self.dtype))

    def cache(self, junk: float) -> Host:
        """[layer, block, token, 2, head, dim]: what was written before the step, and junk."""
        cache = np.full((LAYERS, NUM_BLOCKS, self.block, 2, self.num_kv, self.dim), junk)
        for row, (cached, _) in enumerate(self.rows):
            j = np.arange(cached)
            block = self.tables[row, j // self.block]
            live = block > 0
            cache[LAYER, block[live], j[live] % self.block] = self.keys[row][:cached][live]
        return cache

    def new(self) -> Host:
        """[T, 2, Hkv, D]; padding is poison."""
        own = [keys[-new:] for keys, (_, new) in zip(self.keys, self.rows)]
        poison = np.full((self.padding, 2, self.num_kv, self.dim), np.nan)
        return np.concatenate([*own, poison])

    def step(self) -> tuple[DeviceState, StepInput]:
        n, i32 = len(self.rows), torch.int32
        cached = torch.tensor([a for a, _ in self.rows] + [0], dtype=i32)
        starts = torch.tensor([0, *np.cumsum(self.query_len), self.total], dtype=i32)
        state = DeviceState(
            (torch.from_numpy(self.tables.copy()),),
            cached,
            torch.zeros_like(cached),
            torch.zeros(n + 1, NUM_COLUMNS, dtype=i32),
            torch.zeros(1, 256, dtype=i32),
            torch.zeros(1, 8),
        )
        resets = torch.zeros(1, 2 + NUM_COLUMNS, dtype=i32)
        resets[:, 0] = n
        step = StepInput(
            torch.arange(n + 1, dtype=i32),
            starts,
            torch.zeros(self.tokens, dtype=i32),
            torch.zeros(n + 1, 2, dtype=i32),
            torch.zeros(3, dtype=i32),
            resets,
            (torch.tensor([[n, 0, 0]], dtype=i32),),
            torch.zeros(1, 3, dtype=i32),
        )
        return state, step

    def expected(self) -> tuple[Host, Host]:
        """By the law, in float64, a row at a time."""
        out, lse, at = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf), 0
        for (cached, new), keys in zip(self.rows, self.keys):
            out[at : at + new], lse[at : at + new] = reference.attention(
                self.q[at : at + new],
                keys[:, 0],
                keys[:, 1],
                cached + np.arange(new),
                scale=self.spec.scale,
                causal=self.spec.causal,
                window=self.spec.window,
                softcap=self.spec.softcap,
                sinks=self.sink,
            )
            at += new
        return out, lse


def run(
    kind: Any, case: Case, junk: float = np.nan, return_lse: bool = False
) -> tuple[Host, Host | None, dict[str, Host]]:
    attention = kind(CPU, case.dtype)
    with torch.inference_mode():
        kv = attention.alloc((case.group,), {0: NUM_BLOCKS})
        cache = case.cache(junk)
        arrays = {"k": cache[:, :, :, 0], "v": cache[:, :, :, 1]}
        kv = attention.import_blocks(kv, case.group, range(NUM_BLOCKS), arrays)
        state, step = case.step()
        view, state = OPS.expand(RectangleTables(OPS), state, step, (case.block,), 8)
        num_decode = int((np.cumsum(case.query_len != 1) == 0).sum())
        split = (num_decode, num_decode, len(case.rows))
        host = attention.plan_host(HostStep(case.query_len, case.seq_len, split), case.key)
        (plan,) = attention.plan(state, view, step, case.key, host, (case.spec,), (case.group,))
        new = case.tensor(case.new())
        out, lse, kv = attention.attend(
            kv,
            LAYER,
            case.tensor(case.q),
            new[:, 0],
            new[:, 1],
            plan,
            sinks=None if case.sink is None else torch.from_numpy(case.sink),
            return_lse=return_lse,
        )
    exported = attention.export_blocks(kv, case.group, range(NUM_BLOCKS))
    return out.double().numpy(), None if lse is None else lse.numpy(), exported


KINDS = [TorchAttention, SdpaAttention, BagAttention]
CASES: dict[str, dict[str, Any]] = {
    "group 3, dim 64, 3 KV heads": {"dim": 64, "num_kv": 3},
    "group 7, dim 80": {"group_size": 7, "dim": 80},
    "group 1, block 32": {"group_size": 1, "block": 32},
    "one KV head, dim 128, block 1": {"num_kv": 1, "dim": 128, "block": 1},
    "no padding": {"padding": 0},
    "decode": {"rows": DECODE, "block": 4},
    "decode in a window": {"rows": DECODE, "block": 4, "options": {"window": 5}},
    "prefill alone": {"rows": ((0, 5), (0, 40), (64, 9))},
    "window": {"block": 4, "options": {"window": 7}},
    "window of one": {"options": {"window": 1}},
    "window of a block and one": {"options": {"window": 17}},
    "window and softcap": {"block": 4, "options": {"window": 40, "softcap": 2.0}},
    "softcap": {"options": {"softcap": 0.7}},
    "sinks": {"sinks": True},
    "sinks in a window": {"sinks": True, "options": {"window": 9}},
    "not causal, softcap": {"options": {"causal": False, "softcap": 0.5}},
    "not causal": {"options": {"causal": False}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_ragged_mixed_steps_give_the_law_in_float64(kind: Any, name: str) -> None:
    case = Case(**CASES[name], dtype="float64")
    out, _, _ = run(kind, case)
    np.testing.assert_allclose(out, case.expected()[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "window and softcap", "sinks"])
def test_float32_stays_within_its_rounding(kind: Any, name: str) -> None:
    case = Case(**CASES[name])
    out, _, _ = run(kind, case)
    np.testing.assert_allclose(out, case.expected()[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", [TorchAttention, SdpaAttention])
@pytest.mark.parametrize("name", ["decode", "softcap", "group 3, dim 64, 3 KV heads"])
def test_bfloat16_rounds_operands_and_result_but_not_scores(kind: Any, name: str) -> None:
    case = Case(**CASES[name], dtype="bfloat16")
    case.q *= 8  # large scores: rounding them to 16 bits would cost a factor of e ** 0.1
    out, _, _ = run(kind, case)
    expected = case.expected()[0]
    # weights and result are rounded once each, at 2 ** -9, relative to the values that are mixed
    np.testing.assert_allclose(out, expected, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "window", "softcap", "not causal"])
def test_lse_is_the_natural_log_of_the_sum(kind: Any, name: str) -> None:
    case = Case(**CASES[name])
    out, lse, _ = run(kind, case, return_lse=True)
    expected, expected_lse = case.expected()
    assert lse is not None and lse.dtype == np.float32
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["window", "decode", "sinks in a window", "one KV head, dim 128, block 1"]
)
def test_what_unused_slots_hold_changes_no_bit(kind: Any, name: str) -> None:
    case = Case(**CASES[name])
    clean, _, _ = run(kind, case, junk=0.0)
    for junk in (np.nan, np.inf, -3e38):
        found, _, _ = run(kind, case, junk=junk)
        np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "decode in a window", "window and softcap"])
def test_rows_in_many_classes_give_the_same(
    kind: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(**CASES[name], dtype="float64")
    monkeypatch.setattr(attention_module, "WASTED_BLOCKS", 0)
    monkeypatch.setattr(attention_module, "GATHER_BYTES", 1)
    out, lse, _ = run(kind, case, return_lse=True)
    assert lse is not None
    np.testing.assert_allclose(out, case.expected()[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, case.expected()[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_tokens_give_zero(kind: Any) -> None:
    out, _, _ = run(kind, Case())
    assert not out[-3:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_writes_its_keys_and_values_at_their_slots_and_nowhere_else(kind: Any) -> None:
    case = Case(rows=MIX, block=4)
    _, _, exported = run(kind, case, junk=7.0)
    expected = case.cache(7.0)
    for row, length in enumerate(case.seq_len):
        j = np.arange(length)
        expected[LAYER, case.tables[row, j // 4], j % 4] = case.keys[row]
    for place, name in enumerate("kv"):
        found = exported[name]
        assert found.shape == (LAYERS, NUM_BLOCKS, 4, case.num_kv, case.dim)
        np.testing.assert_array_equal(found[:, 1:], expected[:, 1:, :, place].astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_is_the_inverse_of_export(kind: Any, dtype: str) -> None:
    case = Case(dtype=dtype)
    attention = kind(CPU, dtype)
    rng, shape = np.random.default_rng(1), (LAYERS, 3, case.block, case.num_kv, case.dim)
    arrays = {name: OPS.host(case.tensor(rng.standard_normal(shape))) for name in "kv"}
    kv = attention.alloc((case.group,), {0: 9})
    kv = attention.import_blocks(kv, case.group, (5, 1, 8), arrays)
    back = attention.export_blocks(kv, case.group, (5, 1, 8))
    for name in "kv":
        assert back[name].dtype == arrays[name].dtype
        np.testing.assert_array_equal(back[name], arrays[name])
    swapped = attention.export_blocks(kv, case.group, (8,))
    np.testing.assert_array_equal(swapped["v"][:, 0], arrays["v"][:, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_copied_blocks_hold_the_same_in_all_layers(kind: Any) -> None:
    case = Case()
    attention = kind(CPU, "float32")
    shape = (LAYERS, 2, case.block, case.num_kv, case.dim)
    arrays = {name: np.random.default_rng(2).standard_normal(shape, np.float32) for name in "kv"}
    kv = attention.import_blocks(attention.alloc((case.group,), {0: 9}), case.group, (3, 4), arrays)
    kv = attention.copy_blocks(kv, case.group, torch.tensor([3, 4, 0]), torch.tensor([7, 6, 0]))
    copied = attention.export_blocks(kv, case.group, (7, 6))
    np.testing.assert_array_equal(copied["k"], arrays["k"])
    np.testing.assert_array_equal(copied["v"], arrays["v"])


def test_a_pool_may_hold_groups_of_another_shape_but_the_same_size() -> None:
    wide = Case(num_kv=4, dim=32, block=8).group
    narrow = KVGroup(1, "full", 16, LAYERS, Case(num_kv=2, dim=32).spec, 0)
    attention = TorchAttention(CPU, "float32")
    assert attention.block_bytes(wide) == attention.block_bytes(narrow)
    (pool,) = attention.alloc((wide, narrow), {0: 5})
    assert pool.nbytes == 6 * attention.block_bytes(wide)
    odd = KVGroup(1, "full", 32, LAYERS, Case(num_kv=2, dim=32).spec, 0)
    with pytest.raises(InvalidArgument, match="one size"):
        attention.alloc((wide, odd), {0: 5})


def test_what_is_not_supported_is_refused() -> None:
    attention, case = TorchAttention(CPU, "float32"), Case(sinks=True)
    with pytest.raises(InvalidArgument, match="sink"):
        run(TorchAttention, case, return_lse=True)
    uneven = AttentionSpec(2, 2, 32, 16, 1.0, KVFormat("float32"), 0)
    with pytest.raises(NotSupported, match="V heads"):
        attention.alloc((KVGroup(0, "full", 16, 1, uneven, 0),), {0: 4})


def test_classes_hold_every_row_once_and_keep_waste_and_size_within_limits() -> None:
    rng = np.random.default_rng(3)
    for count in (1, 2, 32, 200):
        need = rng.geometric(0.05, count)
        classes = split_classes(need, 300)
        rows = [np.arange(count)[rows] for rows, _ in classes]
        assert sorted(np.concatenate(rows)) == list(range(count))
        for own, (_, width) in zip(rows, classes):
            assert width == need[own].max()
            assert len(own) == 1 or (width * len(own) <= 300 and (width - need[own]).sum() <= 64)
    assert split_classes(np.zeros(0, np.int64), 300) == []
