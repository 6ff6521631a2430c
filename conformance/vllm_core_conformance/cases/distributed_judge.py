"""Judges a group's collectives bit by bit, in the process (or for the shard) that has its part.

Numbers are small integers that tell which device and place they come from, so that every sum is
exact in every dtype and a wrong one names who is missing.

Knows: what each collective computes. Does not know: transports, how many processes there are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend.communicator import Group
from vllm_core.errors import PeerLost
from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.target import numpy_dtype

Numbers = NDArray[Any]

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
GRACE = 2.0
"""Seconds beyond the declared time in which a lost peer must have been told."""


@dataclass(frozen=True)
class Problem:
    """One collective on one shape."""

    op: str
    shape: tuple[int, ...]
    axis: int
    dtype: str

    def __str__(self) -> str:
        where = "" if self.op == "all_reduce" else f" along axis {self.axis}"
        return f"{self.op} of {list(self.shape)} {self.dtype}{where}"


def problems(world: int, dtypes: Sequence[str]) -> Iterator[Problem]:
    """Odd and empty sizes, every axis; shapes that look alike when axes are mixed up."""
    for dtype in dtypes:
        for shape in ((1,), (7,), (0,), (3, 5), (2, 0, 3)):
            yield Problem("all_reduce", shape, 0, dtype)
        for shape, axis in (((1,), 0), ((5,), 0), ((3, 5), 0), ((3, 5), 1), ((0, 2), 0)):
            yield Problem("all_gather", shape, axis, dtype)
        for op in ("reduce_scatter", "all_to_all"):
            yield Problem(op, (world,), 0, dtype)
            yield Problem(op, (3 * world, 2), 0, dtype)
            yield Problem(op, (3, 2 * world), 1, dtype)
            yield Problem(op, (2, world, 3), -2, dtype)
            yield Problem(op, (0, 4), 0, dtype)


def inputs(problem: Problem, world: int, seed: int) -> list[Numbers]:
    """Of each device, in the problem's dtype: integers below 32, so that eight add up exactly in
    bfloat16; first 1, 2, 4, ... by device where sums can tell them apart."""
    rng = np.random.default_rng([seed, world, *problem.shape, OPS.index(problem.op)])
    found = []
    for rank in range(world):
        values = rng.integers(1, 32, problem.shape)
        if values.size:
            values.reshape(-1)[-1] = (1 << rank) % 31 + 1  # the tail: what is dropped first
        found.append(values.astype(numpy_dtype(problem.dtype)))
    return found


def expected(problem: Problem, given: Sequence[Numbers], rank: int) -> Numbers:
    """What device `rank` must get, in int64."""
    exact = [x.astype(np.int64) for x in given]
    world, axis = len(given), problem.axis
    total: Numbers = np.stack(exact).sum(0, dtype=np.int64)
    if problem.op == "all_reduce":
        return total
    if problem.op == "all_gather":
        return np.concatenate(exact, axis)
    if problem.op == "reduce_scatter":
        return np.split(total, world, axis)[rank]
    return np.concatenate([np.split(x, world, axis)[rank] for x in exact], axis)


def judge(problem: Problem, given: Sequence[Numbers], rank: int, got: Any) -> Evidence:
    """Bitwise; Failed says which element, and whose share is missing or doubled."""
    exact = expected(problem, given, rank)
    got = np.asarray(got)
    where = f"{problem} over {len(given)}: device {rank}"
    require(
        got.shape == exact.shape,
        f"{where} gets shape {list(got.shape)}, expected {list(exact.shape)}",
    )
    require(
        got.dtype == given[0].dtype,
        f"{where} gets dtype {got.dtype}, expected {given[0].dtype}",
    )
    wrong = np.argwhere(got.astype(np.float64) != exact)
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        found = got[place].astype(np.float64)
        raise Failed(
            f"{where} gets {found:g} at {list(place)}, expected {int(exact[place])}"
            f"{_blame(problem, given, rank, place, found)}; {len(wrong)} of {exact.size} are off"
        )
    return Evidence(checks=2 + exact.size)


def _blame(
    problem: Problem, given: Sequence[Numbers], rank: int, place: tuple[int, ...], found: float
) -> str:
    """Whose share explains a wrong sum, or which device's turn it was."""
    world = len(given)
    if problem.op in ("all_reduce", "reduce_scatter"):
        parts = list(given)
        if problem.op == "reduce_scatter":
            parts = [np.split(x, world, problem.axis)[rank] for x in given]
        shares = [float(x[place].astype(np.float64)) for x in parts]
        off = found - sum(shares)
        for who, share in enumerate(shares):
            if off == -share:
                return f": the share of device {who} ({share:g}) is missing"
            if off == share:
                return f": the share of device {who} ({share:g}) counts twice"
        return ""
    size = expected(problem, given, rank).shape[problem.axis] // world
    return f": that part comes from device {place[problem.axis] // size}"


def judge_group(
    group: Group,
    rank: int,
    seed: int,
    to_device: Callable[[Numbers], Any],
    to_host: Callable[[Any], Numbers],
    dtypes: Sequence[str],
    call: Callable[[Problem, Callable[[Any], Any], Any], Any] | None = None,
) -> Evidence:
    """All problems of the group's size, as seen by device `rank`; every device does the same.

    call(problem, fn, x): runs fn on x the way programs run there; None: directly.
    """
    found = Evidence()
    for problem in problems(group.size, dtypes):
        given = inputs(problem, group.size, seed)
        x = to_device(given[rank])
        fn = collective(group, problem)
        got = fn(x) if call is None else call(problem, fn, x)
        found += judge(problem, given, rank, to_host(got))
        require(
            bool((to_host(x) == given[rank]).all()),
            f"{problem} over {group.size}: device {rank} finds its own argument changed",
        )
    return found


def collective(group: Group, problem: Problem) -> Callable[[Any], Any]:
    """x -> what the group makes of it."""
    method = getattr(group, problem.op)
    if problem.op == "all_reduce":
        return lambda x: method(x)
    return lambda x: method(x, problem.axis)


def judge_lost_peer(act: Callable[[], object], declared: float) -> Evidence:
    """`act` is a collective whose peer is gone: PeerLost within the declared seconds. It runs in a
    thread, since the fault to be found is that it never comes back."""
    told: list[BaseException | None] = []

    def attempt() -> None:
        try:
            act()
            told.append(None)
        except BaseException as error:
            told.append(error)

    begin = time.monotonic()
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(2 * (declared + GRACE))
    waited = time.monotonic() - begin
    if not told:
        raise Failed(f"a collective whose peer is gone hangs, for {waited:.1f} s so far")
    (error,) = told
    if error is None:
        raise Failed("a collective without one of its peers came back as if nothing had happened")
    if not isinstance(error, PeerLost):
        raise Failed(
            f"a lost peer was told as {type(error).__name__}, expected PeerLost: {error}"
        ) from error
    require(
        waited <= declared + GRACE,
        f"a lost peer was told after {waited:.1f} s, declared are {declared:g} s",
    )
    return Evidence(checks=3)
