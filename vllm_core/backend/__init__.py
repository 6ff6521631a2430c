"""The seam: what the core asks of a backend, and what it promises."""

from __future__ import annotations

from vllm_core.backend.attention import (
    INT8_KV,
    KV,
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HostStep,
    KVFormat,
    KVGroup,
)
from vllm_core.backend.capabilities import (
    BucketPolicy,
    Capabilities,
    MemoryReport,
    StepConstraints,
)
from vllm_core.backend.communicator import Communicator, SingleDevice
from vllm_core.backend.hookspecs import hookimpl
from vllm_core.backend.interface import (
    SEAM_VERSION,
    BackendInfo,
    Device,
    DeviceInfo,
    DeviceStep,
    Executable,
    Fetch,
    OpenConfig,
    Probe,
    Program,
    Runtime,
)
from vllm_core.backend.step import APPLY_ROWS, StepLayout
from vllm_core.ops import BlockTables, RectangleTables

__all__ = [
    "APPLY_ROWS",
    "INT8_KV",
    "KV",
    "SEAM_VERSION",
    "AttentionBackend",
    "AttentionPlan",
    "AttentionSpec",
    "BackendInfo",
    "BlockTables",
    "BucketPolicy",
    "Capabilities",
    "Communicator",
    "Device",
    "DeviceInfo",
    "DeviceStep",
    "Executable",
    "Fetch",
    "HostStep",
    "KVFormat",
    "KVGroup",
    "MemoryReport",
    "OpenConfig",
    "Probe",
    "Program",
    "RectangleTables",
    "Runtime",
    "SingleDevice",
    "StepConstraints",
    "StepLayout",
    "hookimpl",
]
