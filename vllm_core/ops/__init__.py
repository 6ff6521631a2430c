"""The contract: what each op computes, on what data."""

from __future__ import annotations

from vllm_core.ops.arrays import Array, HostArray, LazyArray, Param, ParamSpec, Part
from vllm_core.ops.block_table import BlockTables, RectangleTables
from vllm_core.ops.interface import ARRAY_VOCABULARY, Ops
from vllm_core.ops.step import (
    NUM_COLUMNS,
    BucketKey,
    Changes,
    Column,
    DeviceState,
    Features,
    Logprobs,
    StepInput,
    StepResult,
    StepView,
)

__all__ = [
    "ARRAY_VOCABULARY",
    "NUM_COLUMNS",
    "Array",
    "BlockTables",
    "BucketKey",
    "Changes",
    "Column",
    "DeviceState",
    "Features",
    "HostArray",
    "LazyArray",
    "Logprobs",
    "Ops",
    "Param",
    "ParamSpec",
    "Part",
    "RectangleTables",
    "StepInput",
    "StepResult",
    "StepView",
]
