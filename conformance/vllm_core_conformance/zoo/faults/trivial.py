"""Backends that compute nothing, cheat, hang or die.

Knows: our runtimes. Does not know: cases.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_core.backend import Executable, OpenConfig, Program, Runtime
from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, HostArray, Param, ParamSpec, Part
from vllm_core_conformance.zoo.kernel import Kernel
from vllm_core_conformance.zoo.runtime import Collection, ZooRuntime, leaves, mapped, torch_open

collection = Collection("trivial")
runtime = collection.runtime

CRASH = frozenset({"crash"})
TIMEOUT = frozenset({"timeout"})


class _After(Kernel):
    """Computes, and then gives something else."""

    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        return out

    def attend(self, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        out, lse, kv = super().attend(kv, layer, q, k, v, plan, **more)
        return self.instead(out, q, v), lse, kv


@collection.kernel("attention gives zeros", worst=True)
class Zeros(_After):
    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        return np.zeros_like(out)


@collection.kernel("attention gives NaN")
class NotANumber(_After):
    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        return np.full_like(out, np.nan)


@collection.kernel("attention gives its queries back")
class EchoesQueries(_After):
    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        return np.resize(q, out.shape)


@collection.kernel("attention gives the mean of the visible values", worst=True)
class MeanOfValues(Kernel):
    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        return super().dot(q, keys) * 0


@collection.kernel("attention gives the token's own value")
class OwnValue(_After):
    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        return np.repeat(v, q.shape[1] // v.shape[1], 1).astype(out.dtype)


@collection.kernel("attention gives the previous output when shapes match")
class PreviousOutput(_After):
    last: HostArray | None = None

    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        before, self.last = self.last, out
        return out if before is None or before.shape != out.shape else before


@collection.kernel("attention is right for small steps and gives zeros for those above 32 tokens")
class RightWhenSmall(_After):
    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        return out if len(out) <= 32 else np.zeros_like(out)


@collection.kernel("attention is right for its first twenty calls")
class RightAtFirst(_After):
    calls = 0

    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        self.calls += 1
        return out if self.calls <= 20 else np.zeros_like(out)


@collection.kernel("attention has a relative noise of 1e-3")
class Noise(_After):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.rng = np.random.default_rng(1)

    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        noise = self.rng.normal(size=out.shape) * 1e-3
        return (out.astype(np.float64) * (1 + noise)).astype(out.dtype)


@collection.kernel("one output in a thousand is 0")
class OneInAThousand(_After):
    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        out.reshape(-1)[499::1000] = 0
        return out


@collection.kernel("the last row of a step is not written")
class LastRowNotWritten(Kernel):
    def attend(self, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        out, lse, kv = super().attend(kv, layer, q, k, v, plan, **more)
        out[max(0, plan.arrays.query_start[-1] - 1)] = 0
        return out, lse, kv


@collection.kernel("two calls with the same input differ in the last bit")
class NotDeterministic(_After):
    calls = 0

    def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
        self.calls += 1
        return np.nextafter(out, out.dtype.type(0)) if self.calls % 2 else out


@runtime("attend refuses everything", expected=frozenset({"capability_lie"}))
class RefusesAttention(ZooRuntime):
    class ATTENTION(Kernel):
        def attend(self, *args: Any, **more: Any) -> Any:
            raise NotSupported("not yet")


@runtime("every program is refused", expected=frozenset({"capability_lie"}))
class RefusesEverything(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        raise NotSupported(f"program {program.name} is not supported")

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        raise NotSupported("no weights")


@runtime("nothing can be opened", expected=frozenset({"capability_lie", "fail"}))
class OpensNothing(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        raise NotSupported("no device")


@runtime("every program raises RuntimeError")
class RaisesAlways(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        def call(*args: Any) -> tuple[Any, ...]:
            raise RuntimeError("kernel launch failed")

        return call


@runtime("programs change their inputs in place")
class MutatesInputs(ZooRuntime):
    class ATTENTION(_After):
        def instead(self, out: HostArray, q: HostArray, v: HostArray) -> HostArray:
            q[...] = 0
            return out


@runtime("results of every program are zeros")
class ZerosEverywhere(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run, first = super().compile(program, key), len(program.consumes)

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            return (*results[:first], *(mapped(np.zeros_like, x) for x in results[first:]))

        return call


@runtime("whatever was fetched has one bit flipped in every ten-thousandth float")
class FlipsBits(ZooRuntime):
    count = 0

    def fetch(self, value: Any) -> Any:
        fetched = super().fetch(value)
        for x in leaves(fetched.wait()):
            if x.dtype.kind in "fV" and x.size:
                self.count += x.size
                if self.count > 10_000:
                    self.count = 0
                    x.reshape(-1).view(np.uint8)[x.dtype.itemsize - 1] ^= 1
        return fetched


# ---------------------------------------------------------------- hangs and deaths
def _dies(name: str, says: str, expected: frozenset[str], last: Any) -> None:
    """A runtime whose fourth program call is its last."""

    def compile_(self: ZooRuntime, program: Program, key: BucketKey | None) -> Executable:
        run = ZooRuntime.compile(self, program, key)

        def call(*args: Any) -> tuple[Any, ...]:
            calls = vars(self).setdefault("calls", [])
            calls.append(1)
            if len(calls) > 3:
                last()
            return run(*args)

        return call

    made = type(name, (ZooRuntime,), {"compile": compile_})
    runtime(says, expected=expected, dangerous=True)(made)


def _segmentation_fault() -> None:
    ctypes.string_at(0)


def _ends_quietly() -> None:
    os._exit(0)


def _raises_interrupt() -> None:
    raise KeyboardInterrupt


def _sleeps() -> None:
    time.sleep(1e6)


def _spins() -> None:
    while True:
        pass


def _exits() -> None:
    sys.exit(0)


def _is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_dies("Aborts", "the device's library aborts the process", CRASH, os.abort)
_dies("SegmentationFault", "a kernel reads address 0", CRASH, _segmentation_fault)
_dies("EndsQuietly", "the process ends with status 0 in the middle of a case", CRASH, _ends_quietly)
_dies("IsKilled", "the process is killed, as by a memory limit", CRASH, _is_killed)
_dies("RaisesSystemExit", "a program raises SystemExit(0)", CRASH, _exits)
_dies("RaisesInterrupt", "a program raises KeyboardInterrupt", CRASH, _raises_interrupt)
_dies("Sleeps", "a program waits for ever", TIMEOUT, _sleeps)
_dies("Spins", "a program computes for ever", TIMEOUT, _spins)


@runtime("opening takes for ever", expected=TIMEOUT, dangerous=True)
class OpensForEver(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        time.sleep(1e6)


@runtime("closing takes for ever", expected=TIMEOUT, dangerous=True)
class ClosesForEver(ZooRuntime):
    def close(self) -> None:
        time.sleep(1e6)


# ---------------------------------------------------------------- over torch
@collection.open("over torch: attention gives zeros for rows that decode", worst=True)
def torch_decode_gives_zeros(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.attention.attend

    def attend(kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        out, lse, kv = right(kv, layer, q, k, v, plan, **more)
        out[: plan.arrays.num_decode] = 0
        return out, lse, kv

    vars(opened.attention)["attend"] = attend
    return opened


@collection.open("over torch: of the rows that decode, those behind the first 32 are not computed")
def torch_decodes_32_rows(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.attention.attend

    def attend(kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        out, lse, kv = right(kv, layer, q, k, v, plan, **more)
        out[32 : plan.arrays.num_decode] = 0
        return out, lse, kv

    vars(opened.attention)["attend"] = attend
    return opened


FAULTS = tuple(collection.faults)
