"""Opens the CPU: for now the portable torch binding as it is.

Knows: which binding drives a CPU. Does not know: models, scheduling.
"""

from __future__ import annotations

import torch

from vllm_core.backend import OpenConfig
from vllm_core.bindings.torch import TorchRuntime


def open_runtime(config: OpenConfig) -> TorchRuntime:
    """The runtime of the one CPU device."""
    return TorchRuntime(torch.device("cpu"), config.dtype, config.threads)
