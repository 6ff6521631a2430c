"""A walk through the layers, recorded once and run again in one call: no Python between kernels.

The first walk of some shape runs as ever while every call of a kernel is noted with its addresses.
What the walk reads of the step (x, rope tables, attention plans) lies in buffers of the recording,
what it computes in an arena of the recorder, so that the addresses hold: the next step copies its
values in and replays. A walk in which anything but our kernels computes is not recorded.

Knows: kernels' calls, torch's dispatch. Does not know: models, what an op computes.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_core.backend import AttentionPlan
from vllm_core.log import get_logger
from vllm_core.ops.interface import LayerBody
from vllm_core_cpu import native
from vllm_core_cpu.attention import PlanArrays
from vllm_core_cpu.weights import DTYPES

Tensor = torch.Tensor
logger = get_logger(__name__)

MAX_TOKENS = 64
"""Steps of more tokens compute so long that Python costs nothing beside them."""
MAX_WALKS = 256
ALIGNMENT = 64
STEP_BYTES = ctypes.sizeof(native.AttendStep)

LINEAR, ATTEND, RMS_NORM, LAYER_NORM, GATE, ROPE, ADD = range(7)
"""Kind in kernels.h."""

_aten = torch.ops.aten
VIEWS = {
    _aten.view.default, _aten._unsafe_view.default, _aten.slice.Tensor, _aten.select.int,
    _aten.reshape.default, _aten.as_strided.default, _aten.unsqueeze.default,
    _aten.squeeze.dim, _aten.detach.default, _aten.alias.default, _aten.transpose.int,
    _aten.view.dtype,
}  # fmt: skip


class Arena:
    """Memory for what a layer computes: two halves in turn, since a layer reads nothing of the
    layers before but its x."""

    def __init__(self) -> None:
        self._halves: list[Tensor] = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._half, self._used, self.is_too_small, self.needed = 0, 0, False, 0

    def begin(self) -> None:
        """Before a walk."""
        self._half, self._used, self.is_too_small, self.needed = 0, 0, False, 0

    def next_layer(self) -> None:
        self._half, self._used = 1 - self._half, 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As torch.empty; where the arena is too small, memory of torch's, and it says so."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        begin = self._used
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.needed = max(self.needed, self._used)
        half = self._halves[self._half]
        if self._used > len(half):
            self.is_too_small = True
            half, begin = torch.zeros(num_bytes, dtype=torch.uint8), 0
        return half[begin : begin + num_bytes].view(dtype).view(tuple(shape))

    def grow(self, tokens: int) -> None:
        """To what walks of MAX_TOKENS need, by the last one, of `tokens`; older recordings must not
        be run again."""
        size = self.needed // tokens * MAX_TOKENS + self.needed
        self._halves = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]


class _Recorder:
    """In the place of the kernels while a walk is recorded: calls and notes."""

    def __init__(self, kernels: native.Native) -> None:
        self._kernels = kernels
        self.calls: list[native.Call] = []
        self.held: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def _note(self, kind: int, struct: Any, address: int, gate: int = 0) -> None:
        copy = struct.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(struct)))
        self.held.append(copy)
        self.calls.append(native.Call(kind, gate, ctypes.addressof(copy), None, None, 0, 0))

    def linear(self, record: int, x: int, x_stride: int, out: int, m: int) -> None:
        self._kernels.linear(record, x, x_stride, out, m)
        self.calls.append(native.Call(LINEAR, 0, record, x, out, x_stride, m))

    def attend(self, record: int) -> None:
        self._kernels.attend(record)
        self._note(ATTEND, native.Attend, record)

    def rms_norm(self, record: int) -> None:
        self._kernels.rms_norm(record)
        self._note(RMS_NORM, native.Rows, record)

    def layer_norm(self, record: int) -> None:
        self._kernels.layer_norm(record)
        self._note(LAYER_NORM, native.Rows, record)

    def gate(self, record: int, kind: int) -> None:
        self._kernels.gate(record, kind)
        self._note(GATE, native.Rows, record, kind)

    def rope(self, record: int) -> None:
        self._kernels.rope(record)
        self._note(ROPE, native.Rope, record)

    def add(self, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """out = x + residual, rows of the last axis; x may have rows further apart."""
        size = out.numel() // len(out)
        rows = native.Rows(
            x=x.data_ptr(), residual=None if residual is None else residual.data_ptr(),
            out=out.data_ptr(), rows=len(out), size=size, x_stride=x.stride(0), out_stride=size,
            dtype=DTYPES[out.dtype],
        )  # fmt: skip
        self._kernels.add(ctypes.addressof(rows))
        self._note(ADD, native.Rows, ctypes.addressof(rows))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees all that torch does in a walk: views pass, a sum and a copy become our kernels' work,
    and anything else ends the recording."""

    def __init__(self, recorder: _Recorder, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder, self._arena = recorder, arena
        self.foreign: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler, nearly a second, to keep this method out of it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in VIEWS:
            return func(*args, **kwargs)
        if func is _aten.add.Tensor and not kwargs and _is_sum(*args[:2]):
            return self._rows(args[0], args[1])
        if func is _aten.clone.default and _has_dense_rows(args[0]):
            return self._rows(args[0], None)
        self.foreign = self.foreign or str(func)
        return func(*args, **kwargs)

    def _rows(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = self._arena.empty(x.shape, x.dtype)
        self._recorder.add(x, residual, out)
        return out


def _is_sum(x: Any, y: Any) -> bool:
    """Whether x + y is one of two arrays alike that our kernel takes."""
    return (
        isinstance(x, Tensor) and isinstance(y, Tensor)
        and x.dtype == y.dtype and x.dtype in DTYPES and x.shape == y.shape and x.dim() > 1
        and x.is_contiguous() and y.is_contiguous() and x.numel() > 0
    )  # fmt: skip


def _has_dense_rows(x: Tensor) -> bool:
    """Whether what belongs to one index of the first axis lies together."""
    return x.dtype in DTYPES and x.dim() > 1 and x.numel() > 0 and x[0].is_contiguous()


@dataclass(frozen=True, eq=False)
class Walk:
    """A recording: its inputs, its calls, its result."""

    tensors: tuple[Tensor, ...]
    steps: tuple[native.AttendStep, ...]
    calls: Any
    out: Tensor
    held: tuple[Any, ...]
    """What the calls' addresses lie in."""


class _Inputs:
    """What a walk reads of the step, in order: tensors and attention plans."""

    def __init__(self, tree: Any) -> None:
        self.tensors: list[Tensor] = []
        self.plans: list[AttentionPlan] = []
        self.others: list[Any] = []
        self._collect(tree)

    def _collect(self, tree: Any) -> None:
        if type(tree) is tuple:
            for branch in tree:
                self._collect(branch)
        elif isinstance(tree, Tensor):
            self.tensors.append(tree)
        elif isinstance(tree, AttentionPlan) and isinstance(tree.arrays, PlanArrays):
            self.plans.append(tree)
        else:
            self.others.append(tree)


def _owned(tree: Any) -> Any:
    """The same inputs in memory of their own."""
    if type(tree) is tuple:
        return tuple(_owned(branch) for branch in tree)
    if isinstance(tree, Tensor):
        return tree.clone(memory_format=torch.contiguous_format)
    if isinstance(tree, AttentionPlan) and isinstance(tree.arrays, PlanArrays):
        step = native.AttendStep.from_buffer_copy(tree.arrays.step)
        record = native.Attend.from_buffer_copy(tree.arrays.record)
        record.step = ctypes.addressof(step)
        arrays = PlanArrays(step, record, ctypes.addressof(record), tree.arrays.held)
        return replace(tree, arrays=arrays)
    return tree


class WalkRecorder:
    """The recordings of one runtime. Programs run one at a time."""

    def __init__(self, kernels: native.Native, *users: Any) -> None:
        """users: who calls the kernels and gives them memory, as their attributes `kernels` and
        `empty`. Held weakly, since one of them holds the recorder: what is closed goes at once."""
        self._kernels, self._users = kernels, tuple(map(weakref.ref, users))
        self._arena = Arena()
        self._walks: OrderedDict[Any, tuple[Walk | None, Any]] = OrderedDict()
        """Key -> (the recording, or None where none can be made; what the key names by id)."""
        self._seen: OrderedDict[Any, None] = OrderedDict()

    def forget(self) -> None:
        """Lets go of all recordings, and of the parameters that they hold."""
        self._walks.clear()
        self._seen.clear()

    def run(
        self, body: LayerBody, x: Tensor, kv: Any, params: Any, specs: Any, shared: Any
    ) -> tuple[Tensor, Any]:
        """As Ops.layers, by the recording where there is one. The second walk of a kind is the one
        that is recorded, since many never come again."""
        inputs = _Inputs((x, shared))
        function = (body.func, *body.args) if isinstance(body, partial) else (body,)
        named = (*function, params, specs, *inputs.others)
        named += tuple(fact for plan in inputs.plans for fact in (plan.spec, plan.group))
        key = (
            tuple(map(id, named)),
            tuple((t.shape, t.dtype) for t in inputs.tensors),
            tuple(pool.data_ptr() for pool in kv),
        )
        if key in self._walks:
            walk = self._walks[key][0]
            if walk is not None:
                return self._replay(walk, inputs), kv
        elif key in self._seen:
            return self._record(key, named, body, x, kv, params, specs, shared)
        else:
            _add(self._seen, key, None)
        return _walk(body, x, kv, params, specs, shared)

    def _record(
        self, key: Any, named: Any, body: LayerBody, x: Tensor, kv: Any, params: Any, specs: Any,
        shared: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        arena, recorder = self._arena, _Recorder(self._kernels)
        x, shared = own = _owned((x, shared))
        arena.begin()
        watch = _Watch(recorder, arena)
        users = [user for user in (held() for held in self._users) if user is not None]
        kept = [user.empty for user in users]
        for user in users:
            user.kernels, user.empty = recorder, arena.empty
        try:
            with watch:
                out, kv = _walk(body, x, kv, params, specs, shared, arena.next_layer)
        finally:
            for user, empty in zip(users, kept, strict=True):
                user.kernels, user.empty = self._kernels, empty
        if arena.is_too_small:  # the next walk of this kind is recorded
            arena.grow(len(x))
            self._walks.clear()
        elif watch.foreign:
            logger.info("layers are walked in Python: %s is not a kernel of ours", watch.foreign)
            _add(self._walks, key, (None, named))
        else:
            inputs = _Inputs(own)
            calls = (native.Call * len(recorder.calls))(*recorder.calls)
            steps = tuple(plan.arrays.step for plan in inputs.plans)
            held = (recorder.held, own, named)
            walk = Walk(tuple(inputs.tensors), steps, calls, out, held)
            _add(self._walks, key, (walk, named))
        return out.clone(), kv

    def _replay(self, walk: Walk, inputs: _Inputs) -> Tensor:
        for own, given in zip(walk.tensors, inputs.tensors, strict=True):
            given = given.contiguous()
            ctypes.memmove(own.data_ptr(), given.data_ptr(), own.nbytes)
        for step, plan in zip(walk.steps, inputs.plans, strict=True):
            ctypes.memmove(ctypes.addressof(step), ctypes.addressof(plan.arrays.step), STEP_BYTES)
        self._kernels.replay(ctypes.addressof(walk.calls), len(walk.calls))
        return walk.out.clone()


def _walk(
    body: LayerBody, x: Tensor, kv: Any, params: Any, specs: Any, shared: Any,
    behind_layer: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Any]:  # fmt: skip
    for layer, spec in zip(params, specs, strict=True):
        x, kv = body(x, kv, layer, spec, spec.kv_layer, *shared)
        behind_layer()
    return x, kv


def _add(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    if len(cache) > MAX_WALKS:
        cache.popitem(last=False)
