"""What the CPU backend tells the core about itself, without importing a framework.

Knows: whether torch is installed, what the machine lends us, which kernels it would run.
Does not know: torch.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence

from vllm_core.backend import BackendInfo, DeviceInfo, Probe, hookimpl
from vllm_core.bindings import machine
from vllm_core.errors import InvalidArgument
from vllm_core_cpu import native


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
    kernels, fix = _kernels()
    found = f"{cpus} usable processors, {total / 2**30:.1f} GiB of memory"
    return Probe([device], reason=f"{found}, {kernels}", fix=fix)


def _kernels() -> tuple[str, str]:
    """Which kernels would run, and the command that would mend it."""
    try:
        found = native.find()
    except InvalidArgument as error:
        return f"unusable kernels: {error}", "unset VLLM_CORE_CPU_ISA"
    if isinstance(found, native.Absent):
        return f"portable ops, which are slower: {found.reason}", found.fix
    if native.is_outdated():
        return f"own kernels: {found.isa}, older than their sources", native.how_to_build()
    return f"own kernels: {found.isa}", ""
