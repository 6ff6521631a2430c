"""What the TPU backend tells the core about itself, without importing a framework.

Knows: whether jax is installed, what a TPU leaves in the file system. Does not know: jax.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from vllm_core.backend import BackendInfo, DeviceInfo, Probe, hookimpl

DEVICES = Path("/dev")


@hookimpl
def vllm_core_backends() -> Sequence[BackendInfo]:
    return [
        BackendInfo(
            name="tpu",
            api=">=0.1,<0.2",
            summary="JAX and Pallas on TPUs; interpreted on a CPU where there are none, if named",
            priority=10,
            probe="vllm_core_tpu.plugin:probe",
            open="vllm_core_tpu.runtime:open_runtime",
            only_by_name=not chips(),
        )
    ]


def chips(devices: Path = DEVICES) -> int:
    """How many TPU chips this machine shows."""
    return len([*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")])


def probe() -> Probe:
    """One device: a TPU, or the CPU on which its kernels are interpreted."""
    for package in ("jax", "jaxlib"):
        if not _is_installed(package):
            return Probe(reason=f"{package} is not installed", fix=f"pip install {package}")
    count = chips()
    if not count:
        device = DeviceInfo(0, "cpu", "interpreted", 0)
        return Probe([device], reason="no TPU here: kernels are interpreted on the CPU, slowly")
    if not _is_installed("libtpu"):
        return Probe(
            reason=f"{count} TPU chips, but libtpu is not installed",
            fix="pip install 'vllm-core-tpu[device]'",
        )
    return Probe([DeviceInfo(0, "tpu", "tpu", 0)], reason=f"{count} TPU chips")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
