"""Memory: what is advertised and not there, what is never given back.

Knows: our runtimes. Does not know: cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_core.backend import (
    KV,
    DeviceStep,
    Executable,
    HostStep,
    KVGroup,
    MemoryReport,
    OpenConfig,
    Program,
    Runtime,
)
from vllm_core.errors import NotSupported, OutOfMemory
from vllm_core.ops import BucketKey, HostArray, Param, ParamSpec, Part
from vllm_core_conformance.zoo.kernel import Kernel
from vllm_core_conformance.zoo.runtime import Collection, ZooRuntime, torch_open

collection = Collection("memory")
runtime = collection.runtime
kernel = collection.kernel

_HELD: dict[int, Any] = {}
"""What leaks: kept for the life of the process."""


@runtime("every run of a program leaves one megabyte behind")
class LeaksPerCall(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run, held = super().compile(program, key), []

        def call(*args: Any) -> tuple[Any, ...]:
            held.append(np.ones(1 << 18, np.float32))
            return run(*args)

        return call


@runtime("a program keeps the arguments of all its calls")
class ArgumentsKept(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run, held = super().compile(program, key), []

        def call(*args: Any) -> tuple[Any, ...]:
            held.append(args)
            return run(*args)

        return call


@runtime("every uploaded step is kept, with a quarter of a megabyte of staging")
class LeaksPerUpload(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.kept: list[Any] = []

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        self.kept.append(np.ones(1 << 16, np.float32))
        return super().upload(packed, host, key)


@kernel("caches that the caller let go are kept as long as the runtime lives")
class CachesKept(Kernel):
    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.kept: list[KV] = []

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        self.kept.append(super().alloc(groups, num_blocks))
        return self.kept[-1]


@kernel("the last cache of a runtime is kept after it was closed")
class CacheOutlivesRuntime(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        kv = super().alloc(groups, num_blocks)
        _HELD[id(self)] = kv
        return kv


@runtime("weights that the caller let go are kept as long as the runtime lives")
class WeightsKept(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.kept: list[Param] = []

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        self.kept.append(super().load(spec, parts))
        return self.kept[-1]


@kernel("a cache that does not fit raises MemoryError instead of OutOfMemory")
class RaisesMemoryError(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        try:
            return super().alloc(groups, num_blocks)
        except OutOfMemory as error:
            raise MemoryError(str(error)) from error


@kernel("a cache that does not fit raises NotSupported instead of OutOfMemory")
class RaisesNotSupported(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        try:
            return super().alloc(groups, num_blocks)
        except OutOfMemory as error:
            raise NotSupported(str(error)) from error


@kernel("a cache that does not fit is made smaller in silence")
class ShrinksInSilence(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        try:
            return super().alloc(groups, num_blocks)
        except OutOfMemory:
            return tuple(np.zeros((1, 1), self.dtype) for _ in num_blocks)


@kernel("after a failed allocation no other succeeds")
class OutOfMemoryIsFinal(Kernel):
    failed = False

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        if self.failed:
            raise OutOfMemory("no memory for KV blocks")
        try:
            return super().alloc(groups, num_blocks)
        except OutOfMemory:
            self.failed = True
            raise


@runtime("memory() reports more free than there is")
class MoreFreeThanTotal(ZooRuntime):
    def memory(self) -> MemoryReport:
        report = super().memory()
        return MemoryReport(report.total, report.total * 2)


@runtime("memory() reports kilobytes")
class MemoryInKilobytes(ZooRuntime):
    def memory(self) -> MemoryReport:
        report = super().memory()
        return MemoryReport(report.total >> 10, report.free >> 10)


@runtime("memory() reports nothing")
class MemoryIsZero(ZooRuntime):
    def memory(self) -> MemoryReport:
        return MemoryReport(0, 0)


@runtime("memory() reports floats of gigabytes")
class MemoryInGigabytes(ZooRuntime):
    def memory(self) -> MemoryReport:
        report = super().memory()
        return MemoryReport(report.total / 1e9, report.free / 1e9)  # type: ignore[arg-type]


@kernel("the null block is not counted: the last id is not there")
class NullBlockNotAllocated(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        return super().alloc(groups, {pool: n - 1 for pool, n in num_blocks.items()})


@collection.open("over torch: block_bytes leaves out V")
def torch_bytes_of_keys_only(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.attention.block_bytes
    vars(opened.attention)["block_bytes"] = lambda group: right(group) // 2
    return opened


FAULTS = tuple(collection.faults)
