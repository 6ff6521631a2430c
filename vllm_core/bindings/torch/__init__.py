"""The torch binding: portable ops, paged attention, and a runtime for any device of torch's."""

from __future__ import annotations

import torch

from vllm_core.backend import OpenConfig
from vllm_core.bindings.torch.attention import TorchAttention
from vllm_core.bindings.torch.bag_attention import BagAttention
from vllm_core.bindings.torch.ops import TorchOps
from vllm_core.bindings.torch.runtime import TorchRuntime
from vllm_core.bindings.torch.stream import Deferred

__all__ = [
    "BagAttention",
    "Deferred",
    "TorchAttention",
    "TorchOps",
    "TorchRuntime",
    "open_runtime",
]


def open_runtime(config: OpenConfig) -> TorchRuntime:
    """A runtime on the CPU."""
    return TorchRuntime(
        torch.device("cpu"),
        config.dtype,
        config.threads,
        checkpoint_dtype=config.checkpoint_dtype,
    )
