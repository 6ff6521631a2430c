"""The reference backend: numpy in float32 or float64, and the law that the others are compared
with.

Programs copy what they consume and then overwrite the old buffers with NaN, so that a caller who
uses a consumed value is caught. Slow on purpose where that is simpler.

Knows: numpy. Does not know: speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from vllm_core.backend import (
    KV,
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    Capabilities,
    DeviceStep,
    Executable,
    HostStep,
    KVGroup,
    MemoryReport,
    OpenConfig,
    Program,
    RectangleTables,
    Runtime,
    SingleDevice,
)
from vllm_core.bindings.parts import SCHEMES, dense_tensors
from vllm_core.errors import InvalidArgument, NotSupported, OutOfMemory
from vllm_core.ops import (
    Array,
    BucketKey,
    DeviceState,
    HostArray,
    Ops,
    Param,
    ParamSpec,
    Part,
    StepInput,
    StepView,
    reference,
)
from vllm_core.ops.interface import LayerBody


class NumpyOps(Ops):
    """Every op by its reference."""

    name = "numpy"
    xp = np

    def asarray(self, host: HostArray) -> Array:
        return np.array(host)

    def host(self, x: Array) -> HostArray:
        return np.asarray(x)

    def cast(self, x: Array, dtype: str) -> Array:
        return x.astype(dtype)

    def arange(self, count: int) -> Array:
        return np.arange(count, dtype=np.int32)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Array:
        return np.full(shape, value, dtype)

    def put(self, x: Array, index: tuple[Array, ...], value: Array | int | float) -> Array:
        x[index] = value
        return x

    def accumulate(self, x: Array, index: tuple[Array, ...], value: Array) -> Array:
        np.add.at(x, index, value)
        return x

    def amax(self, x: Array) -> Array:
        return x.max(-1)

    def top(self, x: Array, count: int) -> tuple[Array, Array]:
        ids = np.argsort(-x, axis=-1, kind="stable")[..., :count].astype(np.int32)
        return np.take_along_axis(x, ids, -1), ids

    def bits(self, x: Array) -> Array:
        return np.ascontiguousarray(x).view(np.int32)

    def floats(self, x: Array) -> Array:
        return np.ascontiguousarray(x).view(np.float32)

    def words(self, x: Array) -> Array:
        return x.astype(np.int64) & 0xFFFFFFFF

    def word(self, value: int) -> Array | int:
        return value

    def stack_layers(self, layers: Sequence[Any], specs: Sequence[Any]) -> Any:
        return list(layers)

    def layers(
        self,
        body: LayerBody,
        x: Array,
        kv: Any,
        params: Any,
        specs: Sequence[Any],
        shared: tuple[Any, ...] = (),
    ) -> tuple[Array, Any]:
        for layer, spec in zip(params, specs, strict=True):
            x, kv = body(x, kv, layer, spec, spec.kv_layer, *shared)
        return x, kv

    def embed(self, ids: Array, param: Param) -> Array:
        return param["weight"][ids]

    def linear(self, x: Array, param: Param) -> Array:
        return reference.linear(x, param["weight"], param.get("bias")).astype(x.dtype)

    def logits(self, x: Array, param: Param) -> Array:
        return reference.linear(x, param["weight"], param.get("bias"))

    def rms_norm(self, x: Array, param: Param, eps: float) -> Array:
        return reference.rms_norm(x, param["weight"], eps).astype(x.dtype)

    def add_rms_norm(
        self, x: Array, residual: Array, param: Param, eps: float
    ) -> tuple[Array, Array]:
        total = x + residual
        return self.rms_norm(total, param, eps), total

    def layer_norm(self, x: Array, param: Param, eps: float) -> Array:
        return reference.layer_norm(x, param["weight"], param.get("bias"), eps).astype(x.dtype)

    def rope_table(
        self, positions: Array, inverse_frequency: HostArray, scale: float
    ) -> tuple[Array, Array]:
        return reference.rope_table(positions, inverse_frequency, scale)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        return reference.rope(x, cos, sin).astype(x.dtype)

    def silu_and_mul(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        return (reference.activation(x[:, :half], "silu") * x[:, half:]).astype(x.dtype)

    def gelu_and_mul(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        return (reference.activation(x[:, :half], "gelu_tanh") * x[:, half:]).astype(x.dtype)

    def activation(self, x: Array, kind: str) -> Array:
        return reference.activation(x, kind).astype(x.dtype)

    def moe_route(
        self, logits: Array, top_k: int, renormalize: bool, valid: Array
    ) -> tuple[Array, Array]:
        return reference.moe_route(logits, top_k, renormalize, valid)

    def moe_experts(
        self, x: Array, ids: Array, weights: Array, gate_up: Param, down: Param
    ) -> Array:
        out = reference.moe_experts(x, ids, weights, gate_up["weight"], down["weight"])
        return out.astype(x.dtype)


class NumpyAttention(AttentionBackend):
    """Cache of a pool: [num_blocks, layers, 2, BT, Hkv, D]; a sequence at a time."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)

    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (16, 32, 8, 4, 2, 1, 64, 128)

    def _shape(self, group: KVGroup) -> tuple[int, ...]:
        return (group.layers, 2, group.block_tokens, group.spec.num_kv_heads, group.spec.dim_qk)

    def block_bytes(self, group: KVGroup) -> int:
        return int(np.prod(self._shape(group))) * self.dtype.itemsize

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        pools = {}
        for group in groups:
            if group.spec.dim_v != group.spec.dim_qk:
                raise NotSupported("this layout needs V heads as wide as K heads")
            group.spec.kv.refuse_unless(self.dtype.name)
            size = int(np.prod(self._shape(group)))
            try:  # a slot that was never written is poison
                pools[group.pool] = np.full((num_blocks[group.pool], size), np.nan, self.dtype)
            except MemoryError as error:
                raise OutOfMemory(f"no memory for {num_blocks[group.pool]} KV blocks") from error
        return tuple(pools[pool] for pool in sorted(pools))

    def _view(self, kv: KV, group: KVGroup) -> HostArray:
        pool: HostArray = kv[group.pool]
        return pool.reshape(-1, *self._shape(group))

    def layout_fingerprint(self, group: KVGroup) -> str:
        return f"block-layer-kv-token-head-dim {self._shape(group)} {self.dtype}"

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        blocks = np.moveaxis(self._view(kv, group)[list(ids)], 1, 0)
        return {"k": blocks[:, :, 0].copy(), "v": blocks[:, :, 1].copy()}

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        view = self._view(kv, group)
        for which, name in enumerate(("k", "v")):
            view[list(ids), :, which] = np.moveaxis(arrays[name], 0, 1)
        return kv

    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        kv[group.pool][dst] = kv[group.pool][src]
        return kv

    def plan(
        self,
        state: DeviceState,
        view: StepView,
        step: StepInput,
        key: BucketKey,
        host_part: Any,
        specs: tuple[AttentionSpec, ...],
        groups: tuple[KVGroup, ...],
    ) -> tuple[AttentionPlan, ...]:
        def plan_of(spec: AttentionSpec) -> AttentionPlan:
            group = groups[spec.group]
            tables = state.tables[spec.group][step.row]
            arrays = (view.slots[spec.group], tables, step.query_start, view.seq_lens, view.valid)
            return AttentionPlan(arrays, spec, group)

        return tuple(plan_of(spec) for spec in specs)

    def attend(
        self,
        kv: KV,
        layer: Array | int,
        q: Array,
        k: Array,
        v: Array,
        plan: AttentionPlan,
        *,
        sinks: Array | None = None,
        return_lse: bool = False,
    ) -> tuple[Array, Array | None, KV]:
        if return_lse and sinks is not None:
            raise InvalidArgument("return_lse with sinks: merge applies the sink, once")
        spec, size = plan.spec, plan.group.block_tokens
        slots, tables, query_start, seq_lens, valid = plan.arrays
        cache = self._view(kv, plan.group)
        live = slots[valid]
        if len(np.unique(live[live >= size])) != (live >= size).sum():
            raise InvalidArgument("two tokens of the step write the same KV slot")
        cache[slots // size, layer, 0, slots % size] = k
        cache[slots // size, layer, 1, slots % size] = v
        out = np.zeros((q.shape[0], spec.num_q_heads, spec.dim_v), q.dtype)
        lse = np.full(q.shape[:2], -np.inf, np.float32)
        for row, length in enumerate(seq_lens):
            a, b = query_start[row], query_start[row + 1]
            if a == b:
                continue
            blocks = tables[row, : -(-length // size)]
            keys = cache[blocks, layer].swapaxes(0, 1)  # [2, blocks, BT, Hkv, D]
            keys = keys.reshape(2, -1, *keys.shape[3:])[:, :length]
            positions = length - (b - a) + np.arange(b - a)
            out[a:b], lse[a:b] = reference.attention(
                q[a:b],
                keys[0],
                keys[1],
                positions,
                scale=spec.scale,
                causal=spec.causal,
                window=spec.window,
                softcap=spec.softcap,
                sinks=sinks,
            )
        return out, lse if return_lse else None, kv


class Ready:
    """A value that is on the host already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def wait(self) -> Any:
        return self._value


CAPABILITIES = Capabilities(
    dtypes=frozenset({"float32", "float64"}),
    default_dtype="float32",
    schemes=SCHEMES,
    shares_host_memory=True,
)


class NumpyRuntime(Runtime):
    """Runs programs at once, on copies of what they consume."""

    def __init__(self, dtype: str = "float32") -> None:
        self.caps = CAPABILITIES  # not batch_invariant: a BLAS changes its sums with the rows
        self.dtype = CAPABILITIES.choose_dtype(dtype, None)
        self.ops = NumpyOps()
        self.attention = NumpyAttention(dtype)
        self.block_tables = RectangleTables(self.ops)
        self.comm = SingleDevice()

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        try:
            return Param(concatenate_parts(spec, parts, self.dtype))
        except MemoryError as error:
            raise OutOfMemory(f"no memory for the weight {spec.name} {list(spec.shape)}") from error

    def unload(self, param: Param) -> dict[str, HostArray]:
        return {name: np.array(x) for name, x in param.arrays.items()}

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        return DeviceStep(packed.copy(), self.attention.plan_host(host, key))

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        def run(*args: Any) -> tuple[Any, ...]:
            own = list(args)
            for place in program.consumes:
                own[place] = _map(np.array, args[place])
            with np.errstate(all="ignore"):
                results = program.fn(*own)
            for place in program.consumes:
                _map(_poison, args[place])
            return results

        return run

    def fetch(self, value: Any) -> Ready:
        return Ready(_map(np.array, value))

    def memory(self) -> MemoryReport:
        memory = psutil.virtual_memory()
        return MemoryReport(memory.total, memory.available)

    def close(self) -> None:
        """Nothing is held."""


def concatenate_parts(spec: ParamSpec, parts: Sequence[Part], dtype: str) -> dict[str, HostArray]:
    """Parts joined along the output axis, dequantised, in `dtype` (norms in float32 or better),
    shape checked."""
    if spec.role == "norm" and dtype != "float64":
        dtype = "float32"
    arrays: dict[str, HostArray] = {
        name: np.concatenate(tensors, dtype=dtype, casting="unsafe")
        for name, tensors in dense_tensors(spec, parts).items()
    }
    spec.check(arrays["weight"].shape)
    return arrays


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, np.ndarray):
        return function(tree)
    if isinstance(tree, tuple):
        values = [_map(function, x) for x in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def _poison(x: HostArray) -> HostArray:
    odd = np.iinfo(x.dtype).min // 2 if x.dtype.kind == "i" else -(2**30)
    x.fill(np.nan if x.dtype.kind == "f" else odd)
    return x


def open_runtime(config: OpenConfig) -> NumpyRuntime:
    """The reference backend's entry."""
    return NumpyRuntime(CAPABILITIES.choose_dtype(config.dtype, config.checkpoint_dtype))
