"""One OpenCL device: its queue, its kernels, its memory.

Knows: pyopencl. Does not know: attention, models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
import psutil
import pyopencl as cl
from numpy.typing import NDArray

from vllm_core.backend import MemoryReport
from vllm_core.errors import BackendError, OutOfMemory

Numbers = NDArray[Any]


TRIVIAL = "__kernel void nothing(__global float *x) { x[get_global_id(0)] = 0; }"


def all_devices() -> list[Any]:
    """Every device of every platform that can compile a kernel: a CPU runtime that is older than
    the processor is found, but cannot."""
    found = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    return [device for device in found if _compiles(device)]


def _compiles(device: Any) -> bool:
    try:
        cl.Program(cl.Context([device]), TRIVIAL).build()
    except cl.Error:
        return False
    return True


class Device:
    """Kernels are compiled when it is opened."""

    def __init__(self, index: int) -> None:
        devices = all_devices()
        if index >= len(devices):
            raise BackendError(
                f"device {index} was asked for, but OpenCL sees {len(devices)}; "
                "`vllm-core doctor` lists them"
            )
        self.cl_device = devices[index]
        context = cl.Context([self.cl_device])
        self.context, self.queue = context, cl.CommandQueue(context)
        source = resources.files("vllm_core_opencl").joinpath("attention.cl").read_text()
        program = cl.Program(context, source).build()
        self.write_kv, self.attend = cl.Kernel(program, "write_kv"), cl.Kernel(program, "attend")

    @property
    def shares_host_memory(self) -> bool:
        return bool(self.cl_device.host_unified_memory)

    def memory(self) -> MemoryReport:
        """OpenCL does not tell what is free; where the memory is the host's, the host does."""
        total = int(self.cl_device.global_mem_size)
        free = int(psutil.virtual_memory().available) if self.shares_host_memory else total
        return MemoryReport(total, min(free, total))

    def alloc(self, num_bytes: int, what: str) -> Any:
        """A buffer whose content is undefined. OutOfMemory."""
        limit = int(self.cl_device.max_mem_alloc_size)
        if num_bytes > limit:
            raise OutOfMemory(
                f"{what} needs {num_bytes} bytes in one buffer, but the device allows {limit}; "
                "lower kv_cache_memory"
            )
        with _out_of_memory(what):
            return cl.Buffer(self.context, cl.mem_flags.READ_WRITE, max(num_bytes, 4))

    def put(self, host: Numbers) -> Any:
        """A read-only copy on the device."""
        host = np.ascontiguousarray(host)
        if host.size == 0:
            host = np.zeros(1, np.float32)
        flags = cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR
        with _out_of_memory("an argument of a kernel"):
            return cl.Buffer(self.context, flags, hostbuf=host)

    def write(self, buffer: Any, host: Numbers, offset: int) -> None:
        cl.enqueue_copy(self.queue, buffer, np.ascontiguousarray(host), dst_offset=offset)

    def read(self, host: Numbers, buffer: Any, offset: int = 0) -> None:
        cl.enqueue_copy(self.queue, host, buffer, src_offset=offset)

    def copy(self, buffer: Any, source: int, target: int, num_bytes: int) -> None:
        """Within one buffer; the ranges do not overlap."""
        cl.enqueue_copy(
            self.queue,
            buffer,
            buffer,
            src_offset=source,
            dst_offset=target,
            byte_count=num_bytes,
        )


@contextmanager
def _out_of_memory(what: str) -> Iterator[None]:
    try:
        yield
    except (cl.MemoryError, cl.RuntimeError) as error:
        raise OutOfMemory(f"no device memory for {what}: {error}") from error
