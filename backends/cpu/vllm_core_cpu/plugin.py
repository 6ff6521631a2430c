"""What the CPU backend tells the core about itself, without importing a framework.

Knows: whether torch is installed, what the machine lends us. Does not know: torch.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence

from vllm_core.backend import BackendInfo, DeviceInfo, Probe, hookimpl
from vllm_core.bindings import machine


@hookimpl
def vllm_core_backends() -> Sequence[BackendInfo]:
    return [
        BackendInfo(
            name="cpu",
            api=">=0.1,<0.2",
            summary="PyTorch on the CPU",
            priority=0,
            probe="vllm_core_cpu.plugin:probe",
            open="vllm_core_cpu.runtime:open_runtime",
        )
    ]


def probe() -> Probe:
    """One device: the processors and the memory that this process may use."""
    if importlib.util.find_spec("torch") is None:
        return Probe(reason="torch is not installed", fix="pip install 'torch>=2.10,<3'")
    cpus, (total, _) = machine.usable_cpus(), machine.memory()
    device = DeviceInfo(0, "cpu", platform.machine(), total)
    return Probe([device], reason=f"{cpus} usable processors, {total / 2**30:.1f} GiB of memory")
