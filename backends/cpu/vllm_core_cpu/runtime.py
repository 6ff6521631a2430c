"""Opens the CPU: the torch binding, with our own kernels in its place where they can be had.

Knows: which binding drives a CPU, how its threads wait. Does not know: kernels, models.
"""

from __future__ import annotations

from vllm_core import envs
from vllm_core.backend import OpenConfig, Runtime

SPIN_COUNT = 2000
"""Rounds that an OpenMP thread spins at a barrier before it sleeps, where torch's own ops compute
(float16, float64, or no kernels). libgomp's own choice is to spin
for ever so long, which is up to a third faster on an idle machine and a hundred times slower beside
one busy process (docs/adr/0003)."""


def open_runtime(config: OpenConfig) -> Runtime:
    """The runtime of the one CPU device."""
    envs.default_spin_count(SPIN_COUNT)  # read once, when torch is imported
    from vllm_core_cpu.kernel_runtime import open_runtime

    return open_runtime(config)
