"""The judge of collectives: right groups of both bindings pass it, wrong ones are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_core.backend import OpenConfig
from vllm_core.backend.communicator import Alone, Communicator, Group
from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.errors import PeerLost
from vllm_core_conformance.case import Failed
from vllm_core_conformance.cases import distributed, distributed_judge
from vllm_core_conformance.cases.distributed_judge import (
    inputs,
    judge_group,
    judge_lost_peer,
    problems,
)
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.target import Source, Target

HERE = Path(__file__).parent


# ---------------------------------------------------------------- groups of threads
class Room:
    """Where the threads of a group leave what the others fetch."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.values: list[Any] = [None] * world


class Threads(Group):
    """A right group of threads over numpy arrays."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, len(room.values)

    def index(self) -> int:
        return self.rank

    def swap(self, x: Any) -> list[Any]:
        self.room.values[self.rank] = x
        self.room.barrier.wait()
        found = list(self.room.values)
        self.room.barrier.wait()
        return found

    def total(self, xs: list[Any]) -> Any:
        return np.stack(xs).sum(0, dtype=np.float64).astype(xs[0].dtype)

    def all_reduce(self, x: Any) -> Any:
        return self.total(self.swap(x))

    def all_gather(self, x: Any, axis: int) -> Any:
        return np.concatenate(self.swap(x), axis)

    def reduce_scatter(self, x: Any, axis: int) -> Any:
        return np.split(self.total(self.swap(x)), self.size, axis)[self.rank]

    def all_to_all(self, x: Any, axis: int) -> Any:
        parts = [np.split(other, self.size, axis)[self.rank] for other in self.swap(x)]
        return np.concatenate(parts, axis)


class DropsTail(Threads):
    """The last device's last elements never arrive."""

    def all_reduce(self, x: Any) -> Any:
        xs = [value.copy() for value in self.swap(x)]
        if xs[-1].size > 1:
            xs[-1].reshape(-1)[-1:] = 0
        return self.total(xs)


class GathersBackwards(Threads):
    def all_gather(self, x: Any, axis: int) -> Any:
        return np.concatenate(self.swap(x)[::-1], axis)


class ShiftsParts(Threads):
    def reduce_scatter(self, x: Any, axis: int) -> Any:
        parts = np.split(self.total(self.swap(x)), self.size, axis)
        return parts[(self.rank + 1) % self.size]


class CountsItselfTwice(Threads):
    def all_reduce(self, x: Any) -> Any:
        return super().all_reduce(x) + (x if self.rank else 0 * x)


class SendsToItself(Threads):
    def all_to_all(self, x: Any, axis: int) -> Any:
        super().all_to_all(x, axis)
        return x


class IgnoresAxis(Threads):
    def all_gather(self, x: Any, axis: int) -> Any:
        return super().all_gather(x, 0)


class Widens(Threads):
    def all_reduce(self, x: Any) -> Any:
        return super().all_reduce(x).astype(np.float64)


class Overwrites(Threads):
    def all_reduce(self, x: Any) -> Any:
        found = super().all_reduce(x)
        x[...] = found
        return found


def sentences(kind: Callable[[Room, int], Group], world: int) -> list[str]:
    """What the judge says to each thread's part; empty where it is right."""
    room, said = Room(world), [""] * world

    def one(rank: int) -> None:
        try:
            judge_group(
                kind(room, rank), rank, 3, np.copy, np.asarray, ("float32", "bfloat16", "int32")
            )
        except Failed as failure:
            said[rank] = failure.sentence
            room.barrier.abort()
        except threading.BrokenBarrierError:
            said[rank] = "another thread gave up"

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_a_right_group_passes_in_every_world(world: int) -> None:
    assert sentences(Threads, world) == [""] * world


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DropsTail, ("the share of device 2", "is missing")),
        (GathersBackwards, ("all_gather", "that part comes from device")),
        (ShiftsParts, ("reduce_scatter",)),
        (CountsItselfTwice, ("counts twice",)),
        (SendsToItself, ("all_to_all",)),
        (IgnoresAxis, ("shape",)),
        (Widens, ("dtype float64",)),
        (Overwrites, ("own argument changed",)),
    ],
)
def test_a_planted_fault_is_named(kind: Any, words: tuple[str, ...]) -> None:
    said = [s for s in sentences(kind, 3) if s and s != "another thread gave up"]
    assert said and all(any(word in s for s in said) for word in words), said


def test_sums_of_eight_devices_are_exact_in_bfloat16() -> None:
    for problem in problems(8, ("bfloat16",)):
        total = sum(x.astype(int) for x in inputs(problem, 8, 1))
        assert np.max(total, initial=0) <= 256


# ---------------------------------------------------------------- a lost peer
def test_a_peer_that_is_lost_in_time_is_told() -> None:
    def act() -> None:
        raise PeerLost("gone")

    assert judge_lost_peer(act, 1.0).checks == 3


@pytest.mark.parametrize("error", [None, RuntimeError("reset by peer")])
def test_silence_and_other_errors_about_a_lost_peer_fail(error: Exception | None) -> None:
    def act() -> None:
        if error is not None:
            raise error

    with pytest.raises(Failed, match=r"came back|expected PeerLost"):
        judge_lost_peer(act, 1.0)


@pytest.mark.parametrize("tells", [True, False])
def test_a_lost_peer_that_is_told_late_or_never_fails(
    tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_judge, "GRACE", 0.1)
    is_over = threading.Event()

    def hang() -> None:
        is_over.wait(0.3 if tells else 20)
        raise PeerLost("gone, at last")

    with pytest.raises(Failed, match=r"declared are 0\.1 s" if tells else "hangs"):
        judge_lost_peer(hang, 0.1)
    is_over.set()


# ---------------------------------------------------------------- the cases on a target
def test_one_device_passes_the_cases() -> None:
    target = Target(Source("reference", lambda config: NumpyRuntime("float32")), "float32")
    for case in distributed.CASES:
        assert execute(case, target, 1).status == "pass"


class Doubles(Alone):
    def all_reduce(self, x: Any) -> Any:
        return x + x


class Adds(Alone):
    def all_gather(self, x: Any, axis: int) -> Any:
        return x[None]


class One(Communicator):
    def __init__(self, group: Group) -> None:
        self.group = group

    def axis(self, name: str) -> Group:
        return self.group


@pytest.mark.parametrize("group", [Doubles(), Adds()])
def test_a_group_of_one_that_is_no_identity_fails(group: Group) -> None:
    def opened(config: OpenConfig) -> NumpyRuntime:
        runtime = NumpyRuntime("float32")
        runtime.comm = One(group)
        return runtime

    target = Target(Source("planted", opened), "float32")
    results = [execute(case, target, 1) for case in distributed.CASES]
    assert [result.status for result in results] == ["fail", "fail"]
    assert "knows no such axis" in results[1].sentence


# ---------------------------------------------------------------- the bindings, for real
def gloo(folder: Path, *worlds: str) -> dict[str, Any]:
    pytest.importorskip("torch", reason="torch is missing: collectives over gloo were not checked")
    if not hasattr(os, "fork"):
        pytest.skip("no fork here: collectives over gloo were not checked")
    command = [sys.executable, str(HERE / "gloo_ranks.py"), str(folder), *worlds]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert done.returncode == 0 and found, done.stderr
    return found


def environment() -> dict[str, str]:
    path = os.pathsep.join(sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def check(found: dict[str, Any], num_ranks: int) -> None:
    assert len(found) == num_ranks and all(own.get("checks", 0) > 1 for own in found.values()), (
        found
    )


def test_gloo_processes_pass_and_tell_of_a_killed_and_a_frozen_peer(tmp_path: Path) -> None:
    found = gloo(tmp_path, "2", "3", "3-killed", "3-frozen")
    check(found, 2 + 3 + 2 + 2)


@pytest.mark.slow
def test_larger_worlds_and_meshes_of_gloo_processes_pass(tmp_path: Path) -> None:
    check(gloo(tmp_path, "4", "8", "2x3"), 4 + 8 + 6)


def shards(*worlds: str) -> list[dict[str, Any]]:
    pytest.importorskip("jax", reason="jax is missing: collectives over shards were not checked")
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, str(HERE / "jax_shards.py"), *worlds]
    done = subprocess.run(
        command,
        env=environment() | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_eight_fake_devices_pass() -> None:
    found = shards("3", "8")
    assert [own["world"] for own in found] == ["3", "8"]
    assert all(own.get("checks", 0) > 800 for own in found), found


@pytest.mark.slow
def test_meshes_of_fake_devices_pass() -> None:
    found = shards("1", "2", "4", "2x4")
    assert len(found) == 4 and all(own.get("checks", 0) > 200 for own in found), found
