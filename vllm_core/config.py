"""How an engine is set up: facts a user may choose, with their defaults.

Knows: names, ranges, contradictions. Does not know: models, devices, files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_core.errors import InvalidArgument

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Policy = Literal["fcfs", "priority"]


@dataclass(frozen=True)
class EngineConfig:
    """Everything that is fixed for the life of an engine."""

    model: str
    """A directory, a GGUF file, a hub id, or "demo" for the demo weights."""
    tokenizer: str | None = None
    """A directory, file or hub id; None: the model's own."""
    backend: str | None = None
    """Name of a backend; None: the best one that finds a device."""
    dtype: DType = "auto"
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None
    """Longest prompt + output of a sequence, in tokens; None: the model's own context, cut to what
    fits."""
    max_num_seqs: int = 64
    """Rows: sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step; None: the backend's choice."""
    block_size: int | None = None
    """Tokens per KV block; None: chosen from the backend's list by expected waste."""
    num_kv_blocks: int | None = None
    """KV blocks per pool; None: planned from memory."""
    kv_cache_memory: int | None = None
    """Bytes for the KV cache; None: planned from memory_utilization."""
    memory_utilization: float = 0.9
    """Share of the device's free memory that the engine may use."""
    enable_prefix_caching: bool = True
    scheduling_policy: Policy = "fcfs"
    async_scheduling: bool = True
    """Prepare step N+1 on the host while the device runs step N."""
    seed: int | None = None
    """Seeds the requests that bring none; None: from the operating system."""
    threads: int | None = None
    """CPU threads of a CPU device; None: what affinity and cgroup allow."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "block_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1, not {value}")
        if self.max_num_seqs < 1:
            raise InvalidArgument(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        if not 0 < self.memory_utilization <= 1:
            raise InvalidArgument(
                f"memory_utilization must be above 0 and at most 1, not {self.memory_utilization}"
            )
        if self.num_kv_blocks is not None and self.num_kv_blocks < 2:
            raise InvalidArgument(
                f"num_kv_blocks must be at least 2 (block 0 is unused), not {self.num_kv_blocks}"
            )
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16", "float16", "float64")),
            ("load_format", ("auto", "safetensors", "gguf", "dummy")),
            ("scheduling_policy", ("fcfs", "priority")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidArgument(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
