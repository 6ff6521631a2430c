from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import (
    BlockTables,
    HostStep,
    OpenConfig,
    Program,
    Runtime,
    StepLayout,
)
from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.errors import BackendError, NotSupported, WeightError
from vllm_core.ops import (
    NUM_COLUMNS,
    BucketKey,
    Column,
    DeviceState,
    Features,
    LazyArray,
    ParamSpec,
    Part,
    StepResult,
)

jax = pytest.importorskip("jax", reason="the jax runtime was not checked")
from vllm_core.bindings.jax import JaxRuntime, open_runtime  # noqa: E402

CPU = {"platform": "cpu"}
NO_ROWS = HostStep(np.zeros(0, np.int32), np.zeros(0, np.int32), (0, 0, 0))
N, S, T, P, B, VOCAB, LENGTH = 5, 4, 16, 2, 1, 50, 40
BLOCKS = (4, 8)
WIDTHS = (10, 5)
KEY = BucketKey(T, S, WIDTHS)
LAYOUT = StepLayout(KEY, N, P, B, BLOCKS)


@pytest.fixture(scope="module")
def runtime() -> JaxRuntime:
    return open_runtime(OpenConfig("auto", options=CPU))


# ---------------------------------------------------------------- the step, integers bit for bit
def new_state(runtime: Runtime) -> DeviceState:
    put = runtime.ops.asarray
    tables: BlockTables = runtime.block_tables
    return DeviceState(
        tables=tables.alloc(N, WIDTHS),
        num_tokens=put(np.zeros(N + 1, np.int32)),
        last_token=put(np.zeros(N + 1, np.int32)),
        params=put(np.zeros((N + 1, NUM_COLUMNS), np.int32)),
        history=put(np.zeros((P + 1, LENGTH), np.int32)),
        bias=put(np.zeros((B + 1, VOCAB), np.float32)),
    )


def compiled_step(runtime: Runtime) -> Any:
    """Every integer of a step: view, state, result."""

    def step(state: Any, device_step: Any, tokens: Any) -> Any:
        changes = LAYOUT.unpack(device_step.buffer)
        view, state = runtime.ops.expand(runtime.block_tables, state, changes, BLOCKS, VOCAB)
        accepted, state = runtime.ops.advance(state, changes, view, tokens)
        return state, view, StepResult(tokens, accepted, accepted, None)

    return runtime.compile(Program("step", step, consumes=(0,)), KEY)


def random_step(rng: np.random.Generator, lengths: Any) -> tuple[Any, Any]:
    """A packed step over some rows, resets and changes among them, and the tokens that it draws."""
    buffer = LAYOUT.template().copy()
    views = LAYOUT.views(buffer)
    rows = rng.permutation(N)[: rng.integers(1, S + 1)]
    query = rng.integers(0, T // S + 1, len(rows))
    views["row"][: len(rows)] = rows
    views["query_start"][1 : len(rows) + 1] = np.cumsum(query)
    views["query_start"][len(rows) + 1 :] = query.sum()
    views["token_ids"][: query.sum()] = rng.integers(-1, VOCAB, query.sum())
    for at, row in enumerate(rows):
        if lengths[row] + query[at] >= LENGTH or rng.random() < 0.2:
            lengths[row] = rng.integers(0, 8)
            views["resets"][at, :2] = row, lengths[row]
            views["resets"][at, 2 + Column.HISTORY_SLOT] = rng.integers(0, P + 1)
        lengths[row] += query[at]
    for group, width in enumerate(WIDTHS):
        cells = rng.permutation(N * width)[:3]  # distinct cells: a repeated one may keep any value
        views[f"table_changes{group}"][:3] = np.stack(
            (cells // width, cells % width, rng.integers(1, 30, 3)), 1
        )
    places = rng.permutation(LENGTH)[:2]
    views["history_changes"][:2] = np.stack((places * 0, places, rng.integers(0, VOCAB, 2)), 1)
    tokens = np.full((S, 1), -1, np.int32)
    tokens[: len(rows), 0] = rng.integers(-1, VOCAB, len(rows))
    return buffer, tokens


def without_scrap(state: DeviceState) -> Any:
    """Scrap rows take repeated writes, and any of the values may stay."""
    return jax.tree_util.tree_map(lambda x: np.asarray(x)[:-1], state)


def test_a_step_equals_the_law_in_every_integer(runtime: JaxRuntime) -> None:
    law, rng, lengths = NumpyRuntime(), np.random.default_rng(3), np.zeros(N, int)
    runtimes = (runtime, law)
    states, steps = [new_state(r) for r in runtimes], [compiled_step(r) for r in runtimes]
    before = runtime.num_compilations()
    for _ in range(25):
        buffer, tokens = random_step(rng, lengths)
        results = []
        for which, r in enumerate(runtimes):
            device_step = r.upload(buffer, NO_ROWS, KEY)
            states[which], *rest = steps[which](states[which], device_step, r.ops.asarray(tokens))
            results.append(r.fetch(tuple(rest)).wait())
        buffer[:] = -7  # the caller may reuse it at once
        jax.tree_util.tree_map(np.testing.assert_array_equal, *results)
        jax.tree_util.tree_map(np.testing.assert_array_equal, *map(without_scrap, states))
    assert runtime.num_compilations() == before + 1


def test_a_consumed_value_cannot_be_used_again(runtime: JaxRuntime) -> None:
    step, old = compiled_step(runtime), new_state(runtime)
    device_step = runtime.upload(LAYOUT.template(), NO_ROWS, KEY)
    tokens = runtime.ops.full((S, 1), -1, "int32")
    step(old, device_step, tokens)
    assert old.num_tokens.is_deleted()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(old, device_step, tokens)


# ---------------------------------------------------------------- to the device and back
def aligned(count: int, dtype: type) -> Any:
    """0 .. count-1 at an address that jax would gladly share with the device."""
    raw = np.zeros(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    found: Any = raw[start : start + count * 4].view(dtype)
    found[:] = np.arange(count)
    return found


def test_host_memory_is_copied_and_never_aliased(runtime: JaxRuntime) -> None:
    for size in (3, 4096, 1 << 18):
        host, weight = aligned(size, np.int32), aligned(size, np.float32).reshape(1, -1)
        x = runtime.ops.asarray(host)
        step = runtime.upload(host, NO_ROWS, KEY)
        part = Part("dense", {"weight": weight}, 1)
        param = runtime.load(ParamSpec("w", (1, size), "linear"), [part])
        host[:], weight[:] = -1, -1
        for device in (x, step.buffer, param["weight"][0]):
            assert runtime.ops.host(device)[-1] == size - 1
        runtime.ops.host(x)[:] = 9
        assert int(x[1]) == 1


def test_fetch_gives_the_same_tree_with_numpy_arrays(runtime: JaxRuntime) -> None:
    zeros = runtime.ops.full((2, 1), 0, "int32")
    found = runtime.fetch(StepResult(zeros, zeros[:, 0], zeros[:, 0], None)).wait()
    assert isinstance(found, StepResult)
    assert isinstance(found.tokens, np.ndarray)
    assert found.logprobs is None


def test_parts_are_joined_along_the_output_axis(runtime: JaxRuntime) -> None:
    a, b = np.ones((2, 3), np.float16), np.zeros((1, 3), np.float32)
    lazy = LazyArray((1, 3), "float32", lambda: b)
    spec = ParamSpec("qkv", (3, 3), "linear")
    param = runtime.load(
        spec, [Part("dense", {"weight": a}, 2), Part("dense", {"weight": lazy}, 1)]
    )
    host = runtime.unload(param)["weight"]
    np.testing.assert_array_equal(host, np.concatenate((a, b)))
    assert host.dtype == np.float32


def test_a_param_that_cannot_be_loaded_is_refused(runtime: JaxRuntime) -> None:
    spec, weight = ParamSpec("qkv", (2, 3), "linear"), np.ones((1, 3), np.float32)
    with pytest.raises(NotSupported, match="int3"):
        runtime.load(spec, [Part("int3", {"weight": weight}, 1)])
    with_bias = Part("dense", {"weight": weight, "bias": weight[:, 0]}, 1)
    with pytest.raises(WeightError, match="1 of 2 parts have a bias"):
        runtime.load(spec, [with_bias, Part("dense", {"weight": weight}, 1)])


def test_norms_stay_in_float32(runtime: JaxRuntime) -> None:
    half = open_runtime(OpenConfig("bfloat16", options=CPU))
    part = Part("dense", {"weight": np.ones(4, np.float32)}, 4)
    assert half.load(ParamSpec("norm", (4,), "norm"), [part])["weight"].dtype == "float32"
    assert half.load(ParamSpec("w", (4,), "table"), [part])["weight"].dtype == "bfloat16"


# ---------------------------------------------------------------- opening, limits
def test_every_step_has_a_bucket(runtime: JaxRuntime) -> None:
    policy = runtime.buckets(max_tokens=2048, max_rows=100, max_width=128)
    everything = Features(True, True, True, True, logprobs=20, keep_hidden=True)
    for need in (BucketKey(1, 1, (1, 1)), BucketKey(2048, 100, (128, 1), everything)):
        covered = policy.cover(need)
        assert covered is not None
        assert covered.features.covers(need.features)
        assert covered.tokens >= need.tokens
    greedy = policy.cover(BucketKey(1, 1, (1,)))
    assert greedy is not None
    assert greedy.features == Features()


def test_a_platform_that_jax_does_not_have_is_named() -> None:
    with pytest.raises(BackendError, match="abacus"):
        open_runtime(OpenConfig("auto", options={"platform": "abacus"}))
    with pytest.raises(BackendError, match="device 99"):
        open_runtime(OpenConfig("auto", device_index=99, options=CPU))
    with pytest.raises(NotSupported, match="float64"):
        open_runtime(OpenConfig("float64", options=CPU))


def test_memory_is_reported(runtime: JaxRuntime) -> None:
    assert 0 < runtime.memory().free <= runtime.memory().total


def test_the_probe_imports_no_framework() -> None:
    code = (
        "import sys; from vllm_core.bindings.probes import probe_jax; "
        "assert probe_jax().devices; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_jax_is_a_reason_and_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_core.bindings import probes

    monkeypatch.setattr(probes, "find_spec", lambda name: None)
    assert not probes.probe_jax().devices
    assert probes.probe_jax().fix == "pip install jax"


def test_a_host_array_may_change_as_soon_as_asarray_returned() -> None:
    for _ in range(20):
        host = np.arange(500_000, dtype=np.int32)
        array = open_runtime(OpenConfig(dtype="float32")).ops.asarray(host)
        host[:] = -1
        np.testing.assert_array_equal(np.asarray(array), np.arange(500_000))
