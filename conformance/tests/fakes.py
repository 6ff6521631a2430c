"""Cases and backends for the tests of the supervisor: each backend misbehaves in one way.

A backend is `module:function`; the cases only touch `target.runtime.behave`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_core.backend import Capabilities, OpenConfig
from vllm_core.errors import NotSupported
from vllm_core_conformance.case import Case, Evidence, Failed, Measure
from vllm_core_conformance.target import Target, calling

Behaviour = Callable[[str], float]


class Runtime:
    """As much of a runtime as the fake cases need."""

    def __init__(self, config: OpenConfig, behave: Behaviour, **caps: Any) -> None:
        self.caps = Capabilities(
            dtypes=frozenset({"float32", "bfloat16"}), default_dtype="float32", **caps
        )
        self.dtype = self.caps.choose_dtype(config.dtype, None)
        self.behave = behave
        self.ops = SimpleNamespace()
        self.compilations = 0

    def num_compilations(self) -> int:
        return self.compilations

    def close(self) -> None:
        pass


def _case(name: str, **changes: Any) -> Case:
    def run(target: Target, seed: int) -> Evidence:
        with calling(f"behave {name}"):
            value = target.runtime.behave(name)  # type: ignore[attr-defined]
        if value != 1.0:
            raise Failed(f"{name} returned {value}, expected 1.0", got=np.float32(value))
        measure = Measure("add", 0.1, 1.0, 10, 0.4, 2.5)
        return Evidence(checks=10, measures=[measure], figures={"seed": float(seed)})

    known: dict[str, Any] = {"profiles": frozenset({"core"}), "time_limit": 20.0} | changes
    return Case(f"fake.{name}", f"does {name}", run, **known)


_CASES = (
    _case("first", every_dtype=True),
    _case("second", time_limit=2.0),
    _case("third", needs=("batch_invariant",)),
    _case("speed", profiles=frozenset({"performance", "core"}), scored=False),
)


def all_cases() -> dict[str, Case]:
    return {case.id: case for case in _CASES}


def _opener(at: str, misbehave: Callable[[], float], **caps: Any) -> Callable[[OpenConfig], Any]:
    """A backend that is right but for one case."""

    def behave(name: str) -> float:
        return misbehave() if name == at else 1.0

    return lambda config: Runtime(config, behave, **caps)


def _raise(error: BaseException) -> float:
    raise error


def _sleep() -> float:
    while True:
        time.sleep(1)


def _sleep_with_child() -> float:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return _sleep()


def _print() -> float:
    print("a vendor's debug print")
    os.write(1, b'{"ticket": 1, "kind": "result"}\n')
    return 1.0


def _shout(text: str) -> float:
    """Onto every pipe of the process but the standard ones."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(number, text.encode())
    return 1.0


def _forge(times: int = 1) -> float:
    """A perfect answer for the case at hand, from the vendor's code itself."""
    result = {
        "case": "fake.second", "dtype": "float32", "seed": 0, "status": "pass", "sentence": "",
        "checks": 1, "measures": [], "figures": {}, "notes": [], "details": {}, "traceback": "",
        "seconds": 0.1, "compilations": 0, "compiled": {}, "worker": 0,
    }  # fmt: skip
    for ticket in range(1, 9):
        _shout((json.dumps({"kind": "result", "ticket": ticket, "result": result}) + "\n") * times)
    return 0.0


right = _opener("", lambda: 1.0)
zeros = _opener("second", lambda: 0.0)
aborts = _opener("second", os.abort)
exits = _opener("second", lambda: _raise(SystemExit(0)))
leaves = _opener("second", lambda: os._exit(0))
interrupts = _opener("second", lambda: _raise(KeyboardInterrupt()))
sleeps = _opener("second", _sleep)
sleeps_with_child = _opener("second", _sleep_with_child)
raises = _opener("second", lambda: _raise(ValueError("a shape\nsecond line")))
refuses = _opener("second", lambda: _raise(NotSupported("not today")))
refuses_undeclared = _opener("third", lambda: _raise(NotSupported("not today")))
prints = _opener("second", _print)
garbage = _opener("second", lambda: _shout("hello\n"))
forges = _opener("second", _forge)
one_dtype_lies = _opener("", lambda: 1.0)


def always_sleeps(config: OpenConfig) -> Runtime:
    return Runtime(config, lambda name: _sleep())


def open_raises(config: OpenConfig) -> Runtime:
    raise RuntimeError("no driver")


def open_aborts(config: OpenConfig) -> Runtime:
    os.abort()


def open_sleeps(config: OpenConfig) -> Runtime:
    _sleep()
    raise AssertionError


def open_exits(config: OpenConfig) -> Runtime:
    raise SystemExit(3)


def open_returns_nothing(config: OpenConfig) -> None:
    return None


def bfloat16_aborts(config: OpenConfig) -> Runtime:
    if config.dtype == "bfloat16":
        os.abort()
    return right(config)


class _ClosesBadly(Runtime):
    def close(self) -> None:
        os.abort()


def close_aborts(config: OpenConfig) -> Runtime:
    return _ClosesBadly(config, lambda name: 1.0)
