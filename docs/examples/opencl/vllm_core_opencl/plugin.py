"""What the backend tells the core about itself, without importing pyopencl.

Knows: whether pyopencl is installed and which devices it sees. Does not know: kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from vllm_core.backend import BackendInfo, DeviceInfo, Probe, hookimpl


@hookimpl
def vllm_core_backends() -> Sequence[BackendInfo]:
    return [
        BackendInfo(
            name="opencl",
            api=">=0.1,<0.2",
            summary="Paged attention in OpenCL C, the other ops in numpy",
            priority=-10,
            probe="vllm_core_opencl.plugin:probe",
            open="vllm_core_opencl.runtime:open_runtime",
        )
    ]


def probe() -> Probe:
    """Every OpenCL device of the machine, in the order in which they can be opened."""
    if importlib.util.find_spec("pyopencl") is None:
        return Probe(reason="pyopencl is not installed", fix="pip install 'pyopencl[pocl]'")
    from vllm_core_opencl.device import all_devices

    try:
        found = all_devices()
    except Exception as error:
        return Probe(reason=f"OpenCL cannot be used: {error}", fix="pip install 'pyopencl[pocl]'")
    if not found:
        return Probe(
            reason="OpenCL sees no device that can compile a kernel",
            fix="apt-get install pocl-opencl-icd",  # PoCL's wheel does not know new processors
        )
    devices = [
        DeviceInfo(i, "opencl", d.name.strip(), int(d.global_mem_size)) for i, d in enumerate(found)
    ]
    return Probe(devices, reason=f"{devices[0].arch} by {found[0].platform.name.strip()}")
