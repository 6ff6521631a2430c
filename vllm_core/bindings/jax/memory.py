"""What the framework says about memory, in the seam's words.

Knows: how jax reports memory and its lack. Does not know: what is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import psutil

from vllm_core.backend import MemoryReport
from vllm_core.errors import OutOfMemory


@contextmanager
def allocating(device: jax.Device, what: str) -> Iterator[None]:
    """New arrays go to the device, uncommitted; its lack of memory becomes OutOfMemory."""
    try:
        with jax.default_device(device):
            yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(f"no memory on {device} for {what}: {error}") from error
        raise


def report(device: jax.Device) -> MemoryReport:
    """The device's own figures, or the host's where the device keeps none."""
    stats = device.memory_stats() or {}
    total = stats.get("bytes_limit")
    if total is None:
        memory = psutil.virtual_memory()
        return MemoryReport(memory.total, memory.available)
    return MemoryReport(total, total - stats.get("bytes_in_use", 0))
