"""Cases: the communicator of the opened runtime, axis by axis.

A size-1 axis must cost nothing and change nothing. A larger one is judged in each process that
belongs to it: all of them run the same cases.

Knows: axes of the seam. Does not know: transports, how processes are started.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vllm_core.backend.communicator import AXES, Group
from vllm_core.errors import NotSupported
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.distributed_judge import Problem, judge_group
from vllm_core_conformance.target import Target, calling


def _group(target: Target, name: str) -> Group:
    with calling(f"comm.axis({name!r})"):
        group = target.runtime.comm.axis(name)
    require(
        isinstance(group.size, int) and group.size >= 1,
        f"axis {name!r} has size {group.size!r}, expected a whole number of at least 1",
    )
    return group


def _rank(target: Target, group: Group) -> int:
    with calling("index"):
        value = group.index()
    if not isinstance(value, int):
        (value,) = target.fetch((value,))
    return int(np.asarray(value))


def collectives(target: Target, seed: int) -> Evidence:
    """Every collective of every axis, bit by bit, as model code calls it."""
    found = Evidence()
    for name in AXES:
        group = _group(target, name)
        rank = _rank(target, group)
        require(
            0 <= rank < group.size,
            f"axis {name!r}: this device's index is {rank}, of {group.size}",
        )

        call: Any = _eagerly  # a group of one is the identity: nothing to compile
        if group.size > 1:
            call = partial(_compiled, target, name)
        found += judge_group(
            group,
            rank,
            seed,
            lambda x: target.array(x.astype(np.float64) if x.dtype.kind != "i" else x),
            lambda x: np.asarray(target.fetch((x,))[0]),
            (target.dtype, "int32"),
            call,
        )
        found.checks += 2
    return found


def _compiled(target: Target, name: str, problem: Problem, fn: Any, x: Any) -> Any:
    run = target.compile(
        ("collective", name, problem), lambda x: (fn(x),), name="score", num_results=1
    )
    with calling(f"{problem} along {name!r}"):
        (result,) = run(x)
    return result


def _eagerly(problem: Problem, fn: Any, x: Any) -> Any:
    with calling(str(problem)):
        return fn(x)


def unknown_axis(target: Target, seed: int) -> Evidence:
    """An axis that the seam does not know is refused; the known ones still work."""
    for name in ("", "xp", f"tp{seed}"):
        try:
            target.runtime.comm.axis(name)
        except NotSupported:
            continue
        except Exception as error:
            raise Failed(
                f"comm.axis({name!r}) raised {type(error).__name__}, expected NotSupported"
            ) from error
        raise Failed(f"comm.axis({name!r}) gave a group; the seam knows no such axis")
    return Evidence(checks=3 + sum(_group(target, name).size > 0 for name in AXES))


CASES: tuple[Case, ...] = (
    Case(
        "distributed.collectives",
        "sums, gathers and exchanges exactly along every axis, of size 1 too",
        collectives,
        frozenset(("distributed",)),
        every_dtype=True,
    ),
    Case(
        "distributed.unknown_axis",
        "refuses an axis that does not exist",
        unknown_axis,
        frozenset(("distributed",)),
    ),
)
