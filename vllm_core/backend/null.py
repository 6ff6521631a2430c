"""The null backend: no numerics, no memory; every draw is one fixed token, at once.

For the scheduler's tests and for measuring what the host costs by itself.

Knows: shapes of results. Does not know: numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_core.backend.attention import (
    KV,
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HostStep,
    KVGroup,
)
from vllm_core.backend.capabilities import Capabilities, MemoryReport
from vllm_core.backend.communicator import SingleDevice
from vllm_core.backend.interface import (
    DeviceStep,
    Executable,
    OpenConfig,
    Program,
    Runtime,
)
from vllm_core.errors import NotSupported
from vllm_core.ops import (
    Array,
    BlockTables,
    BucketKey,
    DeviceState,
    HostArray,
    Logprobs,
    Ops,
    Param,
    ParamSpec,
    Part,
    StepInput,
    StepResult,
    StepView,
)

TOKEN = 7
"""What every row draws."""
BLOCK_BYTES_PER_TOKEN = 1024
CAPABILITIES = Capabilities(
    dtypes=frozenset({"float32"}), default_dtype="float32", shares_host_memory=True
)


class NullOps:
    """Makes and keeps nothing; stands where the runner fills state or walks layers."""

    name = "null"

    def asarray(self, host: HostArray) -> Array:
        return host

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Array:
        return None

    def stack_layers(self, layers: Sequence[Any], specs: Sequence[Any]) -> Any:
        return layers


class NullTables(BlockTables):
    """No tables."""

    def alloc(self, num_rows: int, widths: tuple[int, ...]) -> tuple[Array, ...]:
        return ()

    def apply(self, tables: tuple[Array, ...], changes: tuple[Array, ...]) -> tuple[Array, ...]:
        return tables

    def lookup(self, tables: tuple[Array, ...], group: int, row: Array, column: Array) -> Array:
        raise NotSupported("the null backend computes nothing")


class NullAttention(AttentionBackend):
    """Any block size, no cache."""

    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (32, 16, 8, 4, 2, 1, 64, 128)

    def block_bytes(self, group: KVGroup) -> int:
        return BLOCK_BYTES_PER_TOKEN * group.block_tokens * group.layers

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        return ()

    def layout_fingerprint(self, group: KVGroup) -> str:
        return "nothing"

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        raise NotSupported("the null backend keeps no KV")

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        raise NotSupported("the null backend keeps no KV")

    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
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
        raise NotSupported("the null backend computes nothing")

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
        raise NotSupported("the null backend computes nothing")


class Known:
    """A value that was never away."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def wait(self) -> Any:
        return self._value


class NullRuntime(Runtime):
    """Answers every program at once with fixed results of the right shape."""

    def __init__(self) -> None:
        ops: Any = NullOps()
        self.caps = CAPABILITIES
        self.dtype = "float32"
        self.ops: Ops = ops
        self.attention = NullAttention()
        self.block_tables = NullTables()
        self.comm = SingleDevice()

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        return Param({})

    def unload(self, param: Param) -> dict[str, HostArray]:
        return {}

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        return DeviceStep(None, None)

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        if program.name == "step":
            assert key is not None
            return _step(key)
        if program.name == "score":
            return _score
        return lambda *args: tuple(args[place] for place in program.consumes)

    def fetch(self, value: Any) -> Known:
        return Known(value)

    def memory(self) -> MemoryReport:
        return MemoryReport(1 << 34, 1 << 34)

    def close(self) -> None:
        """Nothing is held."""


def _step(key: BucketKey) -> Executable:
    count = key.features.logprobs
    logprobs = None if count < 0 else _logprobs(key.rows, count)
    tokens = np.full((key.rows, 1), TOKEN, np.int32)
    nothing = np.zeros(key.rows, np.int32)
    result = StepResult(tokens, nothing, nothing, logprobs)

    def run(*args: Any) -> tuple[Any, ...]:
        return args[1], args[2], result, None

    return run


def _logprobs(rows: int, count: int) -> Logprobs:
    ids = np.full((rows, 1 + count), TOKEN, np.int32)
    return Logprobs(ids, np.zeros(ids.shape, np.float32), np.ones(rows, np.int32))


def _score(*args: Any) -> tuple[Any, ...]:
    return (_logprobs(len(args[3]), 20),)


def open_runtime(config: OpenConfig) -> NullRuntime:
    """The null backend's entry; any dtype it does not have is refused."""
    CAPABILITIES.choose_dtype(config.dtype, config.checkpoint_dtype)
    return NullRuntime()
