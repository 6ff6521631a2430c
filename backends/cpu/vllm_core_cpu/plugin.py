"""What vllm-core learns of this backend before it is opened.

Knows: a name, a priority, whether torch is installed, the machine's memory. Does not know: torch.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence

import psutil

from vllm_core.backend import BackendInfo, DeviceInfo, Probe, hookimpl


@hookimpl
def vllm_core_backends() -> Sequence[BackendInfo]:
    return [
        BackendInfo(
            name="cpu",
            api=">=0.1,<0.2",
            summary="any CPU, through PyTorch",
            priority=0,
            probe="vllm_core_cpu.plugin:probe",
            open="vllm_core_cpu.runtime:open_runtime",
        )
    ]


def probe() -> Probe:
    """The machine is one device; it needs torch, which is looked for and not imported."""
    if importlib.util.find_spec("torch") is None:
        return Probe(
            reason="torch is not installed",
            fix="pip install torch (the CPU build from pytorch.org's CPU wheel index is smaller)",
        )
    memory = psutil.virtual_memory().total
    device = DeviceInfo(0, "cpu", platform.machine(), memory)
    return Probe([device], reason=f"torch is installed, {psutil.cpu_count()} logical cores")
