"""What the host lends this process: processors and memory, limits of its control group included.

Knows: affinity, cgroup v1 and v2. Does not know: frameworks.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Processors this process may keep busy: its affinity, cut by the group's quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _words(cgroup / "cpu.max")  # "max 100000" or "150000 100000"
    if len(quota) < 2:
        quota = _words(cgroup / "cpu/cpu.cfs_quota_us") + _words(cgroup / "cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        count = min(count, int(quota[0]) // int(quota[1]))
    return max(count, 1)


def memory(cgroup: Path = CGROUP) -> tuple[int, int]:
    """(total, free) bytes: the machine's, cut by the group's limit."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _words(cgroup / limit_file), _words(cgroup / used_file)
        if limit and used and limit[0].isdigit() and int(limit[0]) < total:
            total = int(limit[0])
            free = min(free, max(total - int(used[0]), 0))
    return total, free


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
