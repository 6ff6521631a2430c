from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from vllm_core.backend import HostStep, Program
from vllm_core.errors import BackendError, InvalidArgument, NotSupported, WeightError
from vllm_core.ops import BucketKey, LazyArray, ParamSpec, Part

torch = pytest.importorskip("torch", reason="the runtime of the torch binding was not checked")
from vllm_core.bindings import machine  # noqa: E402
from vllm_core.bindings.torch import Deferred, TorchRuntime  # noqa: E402

CPU = torch.device("cpu")
KEY = BucketKey(8, 4, (1,))


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.fixture
def runtime() -> Iterator[TorchRuntime]:
    runtime = TorchRuntime(CPU, "float32", threads=1)
    yield runtime
    runtime.close()


def add(state: Any, x: Any) -> tuple[Any, Any]:
    """state += x in place; both new values and their negatives."""
    total = state[0].add_(x)
    return (total,), Pair(total * 1, -total)


def program(
    fn: Any = add, consumes: tuple[int, ...] = (0,), num_results: int | None = 1
) -> Program:
    return Program("step", fn, consumes, num_results=num_results)


def blocked(gate: threading.Event) -> Any:
    def fn(state: Any, x: Any) -> Any:
        assert gate.wait(10)
        return add(state, x)

    return fn


def test_a_call_returns_before_the_program_has_run(runtime: TorchRuntime) -> None:
    gate = threading.Event()
    run = runtime.compile(program(blocked(gate)), KEY)
    state = (torch.zeros(3),)
    new, result = run(state, torch.ones(3))
    fetch = runtime.fetch(result)
    assert new is state and isinstance(result, Deferred)
    assert state[0].tolist() == [0, 0, 0]
    gate.set()
    pair = fetch.wait()
    assert isinstance(pair, Pair) and pair.right.tolist() == [-1, -1, -1]
    assert state[0].tolist() == [1, 1, 1]


def test_programs_take_effect_in_order_and_a_fetch_sees_its_own_moment(
    runtime: TorchRuntime,
) -> None:
    run = runtime.compile(program(), KEY)
    state, fetches = (torch.zeros(1),), []
    for x in range(1, 20):
        state, _ = run(state, torch.full((1,), float(x)))
        fetches.append(runtime.fetch(state))
    assert [f.wait()[0].item() for f in fetches] == np.cumsum(np.arange(1, 20)).tolist()


def test_fields_and_parts_of_a_deferred_result_feed_later_programs(runtime: TorchRuntime) -> None:
    gate = threading.Event()
    run = runtime.compile(program(blocked(gate)), KEY)
    double = runtime.compile(program(lambda x: (x * 2,), consumes=()), None)
    _, result = run((torch.arange(4.0),), torch.ones(4))
    (doubled,) = double(result.right[1:3])
    fetch = runtime.fetch((doubled, result.left))
    gate.set()
    twice, left = fetch.wait()
    assert twice.tolist() == [-4, -6] and left.tolist() == [1, 2, 3, 4]


def test_a_program_that_does_not_tell_its_results_is_waited_for(runtime: TorchRuntime) -> None:
    run = runtime.compile(program(num_results=None), KEY)
    state = (torch.zeros(2),)
    new, pair = run(state, torch.ones(2))
    assert new is state and isinstance(pair, Pair) and pair.left.tolist() == [1, 1]


def test_the_caller_keeps_its_tensors_when_an_op_makes_new_ones(runtime: TorchRuntime) -> None:
    run = runtime.compile(program(lambda s, x: ((s[0] + x,), s[0] * 0)), KEY)
    state = (torch.zeros(2),)
    run(state, torch.ones(2))
    runtime.synchronize()
    assert state[0].tolist() == [1, 1]


def test_an_error_reaches_the_fetch_fails_what_is_behind_and_then_the_runtime_goes_on(
    runtime: TorchRuntime,
) -> None:
    def fail(state: Any, x: Any) -> Any:
        raise InvalidArgument("no such thing")

    run, bad = runtime.compile(program(), KEY), runtime.compile(program(fail), KEY)
    gate = threading.Event()
    wait = runtime.compile(program(blocked(gate)), KEY)
    state, one = (torch.zeros(1),), torch.ones(1)
    first = runtime.fetch(wait(state, one)[1])
    second = runtime.fetch(bad(state, one)[1])
    third = runtime.fetch(run(state, one)[1])
    gate.set()
    assert first.wait().left.item() == 1
    with pytest.raises(InvalidArgument, match="no such thing"):
        second.wait()
    with pytest.raises(InvalidArgument, match="no such thing"):
        third.wait()
    assert runtime.fetch(run(state, one)[1]).wait().left.item() == 2


def test_an_error_that_nobody_waited_for_reaches_the_next_call(runtime: TorchRuntime) -> None:
    def fail(state: Any, x: Any) -> Any:
        raise InvalidArgument("no such thing")

    state, one = (torch.zeros(1),), torch.ones(1)
    runtime.compile(program(fail), KEY)(state, one)
    run = runtime.compile(program(), KEY)
    with pytest.raises(InvalidArgument):
        runtime.synchronize()
    assert runtime.fetch(run(state, one)[1]).wait().left.item() == 1


def test_a_wrong_number_of_results_is_named(runtime: TorchRuntime) -> None:
    _, first, _ = runtime.compile(program(num_results=2), KEY)((torch.zeros(1),), torch.ones(1))
    with pytest.raises(BackendError, match="declares 2 results"):
        runtime.fetch(first).wait()


def test_a_closed_runtime_refuses_and_closing_twice_is_fine(runtime: TorchRuntime) -> None:
    run = runtime.compile(program(), KEY)
    runtime.close()
    runtime.close()
    with pytest.raises(BackendError, match="closed"):
        run((torch.zeros(1),), torch.ones(1))


def test_the_synchronous_runtime_gives_the_same() -> None:
    runtime = TorchRuntime(CPU, "float32", 1, synchronous=True)
    state = (torch.zeros(2),)
    new, pair = runtime.compile(program(), KEY)(state, torch.ones(2))
    assert new[0] is state[0] and pair.left.tolist() == [1, 1]
    fetched = runtime.fetch((pair, None)).wait()
    assert fetched[0].right.tolist() == [-1, -1] and fetched[1] is None
    runtime.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("role", ["linear", "embedding", "norm", "experts"])
def test_parts_are_joined_cast_and_given_back(dtype: str, role: str) -> None:
    runtime = TorchRuntime(CPU, dtype, 1, synchronous=True)
    rng = np.random.default_rng(0)
    shape = {"norm": (24,), "experts": (3, 8, 4)}.get(role, (24, 16))
    weight = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    cut = shape[0] // 3
    lazy = LazyArray((cut, *shape[1:]), "bfloat16", lambda: weight[:cut])
    parts = [Part("dense", {"weight": lazy}, cut), Part("dense", {"weight": weight[cut:]}, 2 * cut)]
    if role == "norm":
        parts = [Part("dense", {"weight": weight}, 24)]
    param = runtime.load(ParamSpec("w", shape, role), parts)
    back = runtime.unload(param)
    assert list(back) == ["weight"]
    wide = role == "norm" and dtype != "float64"
    assert back["weight"].dtype == np.dtype("float32" if wide else dtype)
    np.testing.assert_array_equal(back["weight"].astype(np.float32), weight.astype(np.float32))
    runtime.close()


def test_bad_weights_are_refused(runtime: TorchRuntime) -> None:
    weight = np.zeros((4, 3), np.float32)
    with pytest.raises(NotSupported, match="scheme 'int3'"):
        runtime.load(ParamSpec("w", (4, 3), "linear"), [Part("int3", {"weight": weight}, 4)])
    with pytest.raises(WeightError, match=r"\[5, 3\]"):
        runtime.load(ParamSpec("w", (5, 3), "linear"), [Part("dense", {"weight": weight}, 4)])
    with pytest.raises(NotSupported, match="int8"):
        TorchRuntime(CPU, "int8")


def test_an_uploaded_step_does_not_follow_the_host_arrays(runtime: TorchRuntime) -> None:
    packed, lengths = np.arange(5, dtype=np.int32), np.array([1, 2])
    step = runtime.upload(packed, HostStep(lengths, lengths, (1, 1, 2)), KEY)
    packed[:], lengths[:] = 0, 0
    assert step.buffer.tolist() == [0, 1, 2, 3, 4]
    assert step.host_part["query_len"].tolist() == [1, 2]


def test_limits_of_the_control_group_are_obeyed(tmp_path: Any) -> None:
    assert machine.usable_cpus(tmp_path) >= 1
    total, free = machine.memory(tmp_path)
    assert 0 < free <= total
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("300000\n")
    assert machine.usable_cpus(tmp_path) == 1
    assert machine.memory(tmp_path) == (1000000, 700000)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(tmp_path)[0] == total


def test_a_runtime_that_nobody_closed_lets_the_interpreter_end() -> None:
    lines = (
        "import torch",
        "from vllm_core.bindings.torch import TorchRuntime",
        "from vllm_core.backend import Program",
        "runtime = TorchRuntime(torch.device('cpu'), 'float32', 1)",
        "run = runtime.compile(Program('score', lambda x: (x @ x,), num_results=1), None)",
        "[run(torch.ones(300, 300)) for _ in range(100)]",  # still at it when the interpreter ends
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_thread_that_runs_programs_opens_a_team_of_threads() -> None:
    """A second team makes libgomp sleep at every barrier: a step then takes half as long again."""
    script = """
import threading, torch
from vllm_core.backend import Program
from vllm_core.bindings.torch import TorchRuntime
from vllm_core.ops import BucketKey, ParamSpec, Part
import numpy as np

seen = []
def look():  # a thread of its own, so that this one's first look comes after the runtime's
    runtime = TorchRuntime(torch.device("cpu"), "float32", threads=2)
    weight = np.ones((2048, 512), np.float32)
    runtime.load(ParamSpec("w", weight.shape, "linear"), [Part("dense", {"weight": weight}, 2048)])
    torch.zeros(1 << 24).sum()  # large enough for a team, if this thread may have one
    program = Program("step", lambda: (torch.get_num_threads(),))
    run = runtime.compile(program, BucketKey(1, 1, (1,)))
    seen.extend((torch.get_num_threads(), run()[0]))
    runtime.close()
thread = threading.Thread(target=look)
thread.start()
thread.join()
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[1, 2]", done.stderr
