"""The runtime: numpy for what has no kernel yet, OpenCL for attention and the KV cache.

Knows: which part is whose. Does not know: kernels, models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_core.backend import (
    Capabilities,
    DeviceStep,
    Executable,
    Fetch,
    HostStep,
    MemoryReport,
    OpenConfig,
    Program,
    RectangleTables,
    Runtime,
    SingleDevice,
)
from vllm_core.bindings.numpy import NumpyOps, Ready, concatenate_parts
from vllm_core.ops import BucketKey, HostArray, Param, ParamSpec, Part
from vllm_core_opencl.attention import OpenCLAttention
from vllm_core_opencl.device import Device


class OpenCLRuntime(Runtime):
    """One device, float32. Programs run at once, in the caller's thread."""

    def __init__(self, config: OpenConfig) -> None:
        self._device = Device(config.device_index)
        self.caps = Capabilities(
            dtypes=frozenset({"float32"}),
            default_dtype="float32",
            shares_host_memory=self._device.shares_host_memory,
        )
        self.dtype = self.caps.choose_dtype(config.dtype, config.checkpoint_dtype)
        self.ops = NumpyOps()
        self.attention = OpenCLAttention(self._device)
        self.block_tables = RectangleTables(self.ops)
        self.comm = SingleDevice()

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        return Param(concatenate_parts(spec, parts, self.dtype))

    def unload(self, param: Param) -> dict[str, HostArray]:
        return {name: np.array(x) for name, x in param.arrays.items()}

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        return DeviceStep(packed.copy(), self.attention.plan_host(host, key))

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        def run(*args: Any) -> tuple[Any, ...]:
            with np.errstate(all="ignore"):
                return program.fn(*args)

        return run

    def fetch(self, value: Any) -> Fetch:
        return Ready(_copied(value))

    def memory(self) -> MemoryReport:
        report: MemoryReport = self._device.memory()
        return report

    def close(self) -> None:
        self._device.queue.finish()


def _copied(tree: Any) -> Any:
    """What a later program changes in place must not change what was fetched."""
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, (tuple, list)):
        values = [_copied(x) for x in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, dict):
        return {name: _copied(x) for name, x in tree.items()}
    return tree


def open_runtime(config: OpenConfig) -> OpenCLRuntime:
    """BackendError, NotSupported."""
    return OpenCLRuntime(config)
