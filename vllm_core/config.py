"""How an engine is set up: facts a user may choose, with their defaults.

Knows: names, ranges, contradictions. Does not know: models, devices, files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from vllm_core.errors import InvalidArgument

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
KVCacheDType = Literal["auto", "int8"]
Policy = Literal["fcfs", "priority"]
Quantization = Literal[
    "dense",
    "int8",
    "int4",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int8-weight-only",
    "int4-weight-only",
    "int4-g32-weight-only",
    "int4-g64-weight-only",
    "int4-g128-weight-only",
]
"""Bits, perhaps the largest group of inputs that share a scale, perhaps inputs as they are."""

_LEAST = {
    "max_model_len": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "block_size": 1,
    "num_kv_blocks": 2,
    "kv_cache_memory": 1,
    "seed": -(2**63),
    "threads": 1,
}
"""Whole numbers and the least they may be."""


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
    quantization: Quantization | None = None
    """How linear layers are stored (embedding and head in 8 bits, experts dense), perhaps with the
    largest group of inputs that share a scale (int4: 64); "dense": in the model dtype; None: codes
    of a GGUF file stay codes where the backend multiplies such codes (in a model of 32 bits with
    inputs as they are), else dense."""
    kv_cache_dtype: KVCacheDType = "auto"
    """How keys and values are kept; "auto": in the model dtype; "int8": a code of 8 bits each and a
    scale per token and KV head, where the backend can: about half the memory of 16 bits."""
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
        for name in ("model", "tokenizer"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name != "max_num_seqs":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidArgument(f"{name} must be a whole number, not {value!r}")
            if value < least:
                why = " (block 0 is unused)" if name == "num_kv_blocks" else ""
                raise InvalidArgument(f"{name} must be at least {least}{why}, not {value}")
        share = self.memory_utilization
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InvalidArgument(
                f"memory_utilization must be above 0 and at most 1, not {share!r}"
            )
        if self.seed is not None and self.seed >= 2**64:
            raise InvalidArgument(f"seed must fit 64 bits, not {self.seed}")
        allowed: tuple[str | None, ...]
        for name, allowed in (
            ("quantization", (None, *get_args(Quantization))),
            ("dtype", ("auto", "float32", "bfloat16", "float16", "float64")),
            ("kv_cache_dtype", get_args(KVCacheDType)),
            ("load_format", ("auto", "safetensors", "gguf", "dummy")),
            ("scheduling_policy", ("fcfs", "priority")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidArgument(
                    f"{name} must be one of {', '.join(filter(None, allowed))}, not "
                    f"{getattr(self, name)!r}"
                )
