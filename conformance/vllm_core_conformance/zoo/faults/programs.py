"""Programs: compiled, captured and replayed with something of the first call; results that alias;
arguments that are spoilt.

Knows: our runtimes. Does not know: cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.backend import (
    AttentionPlan,
    BucketPolicy,
    DeviceStep,
    Executable,
    HostStep,
    OpenConfig,
    Program,
    Runtime,
)
from vllm_core.bindings.numpy import Ready
from vllm_core.ops import BucketKey, HostArray, Param
from vllm_core_conformance.zoo.kernel import HostLengths, Kernel
from vllm_core_conformance.zoo.runtime import (
    BucketRuntime,
    Collection,
    GraphRuntime,
    ZooRuntime,
    jax_open,
    leaves,
    mapped,
    torch_open,
)

collection = Collection("programs")
runtime = collection.runtime
kernel = collection.kernel


# ---------------------------------------------------------------- captured graphs
@runtime("a replayed graph keeps the host's lengths of its capture")
class CapturedHostLengths(GraphRuntime):
    ATTENTION = HostLengths

    def filled(self, place: int, held: Any, value: Any) -> Any:
        if isinstance(held, DeviceStep):
            return DeviceStep(super().filled(place, held.buffer, value.buffer), held.host_part)
        return super().filled(place, held, value)


@runtime("a replayed graph keeps the step's packed buffer of its capture")
class CapturedStep(GraphRuntime):
    def filled(self, place: int, held: Any, value: Any) -> Any:
        return held if isinstance(held, DeviceStep) else super().filled(place, held, value)


@runtime("a replayed graph keeps the parameters of its capture", worst=True)
class CapturedParams(GraphRuntime):
    def filled(self, place: int, held: Any, value: Any) -> Any:
        return held if _is_params(held) else super().filled(place, held, value)


@runtime("a replayed graph refreshes the first 4096 elements of each argument")
class LargeArgumentsCutShort(GraphRuntime):
    def filled(self, place: int, held: Any, value: Any) -> Any:
        for buffer, x in zip(leaves(held), leaves(value), strict=True):
            buffer.reshape(-1)[:4096] = x.reshape(-1)[:4096]
        return held


@runtime("results of a replayed graph lie in its own buffers, which the next replay overwrites")
class ResultsInGraphBuffers(GraphRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)
        kept: dict[Any, Any] = {}
        first = len(program.consumes)

        def replay(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            shapes = tuple((x.shape, str(x.dtype)) for x in leaves(results[first:]))
            old = kept.setdefault(shapes, results[first:])
            for buffer, x in zip(leaves(old), leaves(results[first:]), strict=True):
                buffer[...] = x
            return (*results[:first], *old)

        return replay


@runtime("two graphs share one output buffer where their results have equal shapes")
class GraphsShareOutput(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.outputs: dict[Any, HostArray] = {}

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run, first = super().compile(program, key), len(program.consumes)

        def shared(x: HostArray) -> HostArray:
            buffer = self.outputs.setdefault((x.shape, str(x.dtype), program.name), np.array(x))
            buffer[...] = x
            return buffer

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            return (*results[:first], *(mapped(shared, x) for x in results[first:]))

        return call


@runtime("the previous results are returned when shapes match", worst=True)
class PreviousResults(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run, first = super().compile(program, key), len(program.consumes)
        last: dict[Any, Any] = {}

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            shapes = tuple((x.shape, str(x.dtype)) for x in leaves(results[first:]))
            before = last.get(shapes, results[first:])
            last[shapes] = results[first:]
            return (*results[:first], *before)

        return call


@runtime("the first call of a program is its capture, and gives what the buffers held: zeros")
class FirstCallIsCapture(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run, first = super().compile(program, key), len(program.consumes)
        captured: list[bool] = []

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            if not captured:
                captured.append(True)
                return (*results[:first], *(mapped(np.zeros_like, x) for x in results[first:]))
            return results

        return call


@runtime("programs of one name and key are taken to be one program")
class ProgramsByName(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.known: dict[Any, Executable] = {}

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        name = (program.name, key)
        return self.known.setdefault(name, super().compile(program, key))


# ---------------------------------------------------------------- plans that are kept
@kernel("the plan of a bucket is made once and kept, tables and all", worst=True)
class PlanKept(Kernel):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.plans: dict[Any, tuple[AttentionPlan, ...]] = {}

    def plan(self, *args: Any) -> tuple[AttentionPlan, ...]:
        key, specs = args[3], args[5]
        return self.plans.setdefault((key, specs), super().plan(*args))


@kernel("a smaller batch in the same bucket keeps the lengths of the rows that are no more")
class OldRowsKept(Kernel):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.held: dict[Any, HostArray] = {}

    def plan(self, *args: Any) -> tuple[AttentionPlan, ...]:
        plans = super().plan(*args)
        for plan in plans:
            lengths = plan.arrays.seq_lens
            old = self.held.get(args[3], lengths)
            is_row = np.diff(plan.arrays.query_start) > 0
            lengths[...] = np.where(is_row, np.maximum(lengths, old), old)
            self.held[args[3]] = lengths.copy()
        return plans


@kernel("lengths are the host's of the step before: the plan is made a step too early")
class LengthsOfLastStep(HostLengths):
    last: dict[str, HostArray] | None = None

    def plan_host(self, host: HostStep, key: BucketKey) -> dict[str, HostArray]:
        now = super().plan_host(host, key)
        before, self.last = self.last, now
        if before is None or before["seq_lens"].shape != now["seq_lens"].shape:
            return now
        return before


# ---------------------------------------------------------------- arguments and results
@runtime("upload keeps the caller's array instead of copying it")
class UploadAliases(ZooRuntime):
    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        return DeviceStep(packed, self.attention.plan_host(host, key))


@runtime("upload fills one staging buffer for all steps, before the last one has run")
class UploadStagesOnce(ZooRuntime):
    staging: HostArray | None = None

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        if self.staging is None or self.staging.shape != packed.shape:
            self.staging = packed.copy()
        self.staging[...] = packed
        return DeviceStep(self.staging, self.attention.plan_host(host, key))


class _InPlace(ZooRuntime):
    """Updates what a program consumes where it lies, as devices without donation do; right."""

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        def run(*args: Any) -> tuple[Any, ...]:
            with np.errstate(all="ignore"):
                results = program.fn(*args)
            for place, new in zip(program.consumes, results, strict=False):
                for old, x in zip(leaves(args[place]), leaves(new), strict=True):
                    old[...] = x
            held = tuple(args[place] for place in program.consumes)
            return (*held, *results[len(held) :])

        return run


@runtime("a fetch copies when it is waited for, and the next replay has overwritten the results")
class FetchIsLate(ResultsInGraphBuffers):
    def fetch(self, value: Any) -> Any:
        return _Late(value)


class _Late:
    def __init__(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        return mapped(np.array, self.value)


@runtime("a fetch hands out the device's own memory")
class FetchIsNoCopy(ZooRuntime):
    def fetch(self, value: Any) -> Ready:
        return Ready(value)


@runtime("a fetch gives a flat list instead of the tree it was given")
class FetchLosesTree(ZooRuntime):
    def fetch(self, value: Any) -> Ready:
        return Ready(leaves(value))


@runtime("a fetch makes integers float, as it stages everything in one buffer")
class FetchMakesFloats(ZooRuntime):
    def fetch(self, value: Any) -> Ready:
        return Ready(mapped(lambda x: x.astype(np.float32), value))


@runtime("arguments that a program does not consume are changed by it")
class ArgumentsSpoilt(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            for place, value in enumerate(args):
                if place not in program.consumes and isinstance(value, np.ndarray):
                    value.reshape(-1)[:1] = 0
            return results

        return call


@runtime("the state is updated in place, but the old one is returned for the new")
class StateNotReturned(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        def run(*args: Any) -> tuple[Any, ...]:
            before = [mapped(np.array, args[place]) for place in program.consumes]
            with np.errstate(all="ignore"):
                results = program.fn(*args)
            if program.name == "apply":
                return (*before, *results[len(before) :])
            return tuple(results)

        return run


@runtime("the results of a program that consumes two arguments come in the other order")
class ConsumedInOtherOrder(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        reordered = replace(program, consumes=tuple(reversed(program.consumes)))
        run = super().compile(reordered, key)

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            n = len(program.consumes)
            return (*reversed(results[:n]), *results[n:])

        return call


@runtime("an exception inside a program is swallowed, and the last results are given again")
class ErrorsSwallowed(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)
        last: list[tuple[Any, ...]] = []

        def call(*args: Any) -> tuple[Any, ...]:
            try:
                last[:] = [run(*args)]
            except Exception:
                if not last:
                    return tuple(args[place] for place in program.consumes)
            return last[0]

        return call


@runtime("a program runs when its results are fetched, after those that were called later")
class ProgramsOutOfOrder(_InPlace):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.waiting: list[Callable[[], None]] = []

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)

        def call(*args: Any) -> tuple[Any, ...]:
            if program.name == "apply":
                self.waiting.append(lambda: _ran(run, args))
                return tuple(args[place] for place in program.consumes)
            results = run(*args)
            while self.waiting:
                self.waiting.pop(0)()
            return results

        return call


# ---------------------------------------------------------------- static shapes
@runtime("every call is compiled anew")
class CompilesEveryCall(BucketRuntime):
    def signature(self, args: Any) -> Any:
        return object()


@runtime("buckets stop at half of what was announced")
class BucketsTooSmall(BucketRuntime):
    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        return super().buckets(-(-max_tokens // 2), max_rows, max_width)


@runtime("results of a padded bucket hold the previous step's rows behind the real ones")
class PaddingKeepsOldRows(BucketRuntime):
    class ATTENTION(Kernel):
        old: HostArray | None = None

        def attend(self, *args: Any, **more: Any) -> Any:
            out, lse, kv = super().attend(*args, **more)
            plan = args[5]
            used = plan.arrays.query_start[-1]
            if self.old is not None and self.old.shape == out.shape:
                out[used:] = self.old[used:]
            self.old = out.copy()
            return out, lse, kv


@runtime("compilations are not counted")
class CompilationsNotCounted(BucketRuntime):
    def num_compilations(self) -> int:
        return 0


# ---------------------------------------------------------------- over the bindings
@collection.open("over torch: the step's buffer is the one of the first upload")
def torch_first_upload(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    upload = opened.upload
    held: dict[BucketKey, Any] = {}

    def wrong(packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        step = upload(packed, host, key)
        return DeviceStep(held.setdefault(key, step.buffer), step.host_part)

    vars(opened)["upload"] = wrong
    return opened


@collection.open("over JAX: from the third call on, results are those of two calls before")
def jax_previous_results(config: OpenConfig) -> Runtime:
    opened: Runtime = jax_open(config)
    compile_right = opened.compile

    def wrong(program: Program, key: BucketKey | None) -> Executable:
        run, last = compile_right(program, key), []
        first = len(program.consumes)

        def call(*args: Any) -> tuple[Any, ...]:
            results = run(*args)
            last.append(results[first:])
            if len(last) < 3:
                return results
            return (*results[:first], *last.pop(0))

        return call

    vars(opened)["compile"] = wrong
    return opened


def _ran(run: Executable, args: tuple[Any, ...]) -> None:
    run(*args)


def _is_params(tree: Any) -> bool:
    if isinstance(tree, Param):
        return True
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return any(_is_params(x) for x in values)


FAULTS = tuple(collection.faults)
