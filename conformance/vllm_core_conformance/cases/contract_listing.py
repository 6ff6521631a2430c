"""Cases: listing a backend and its probe, in a process of their own.

Knows: entry points, probes, which modules are frameworks. Does not know: runtimes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np

from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.target import Target, calling

FRAMEWORKS = ("torch", "jax", "jaxlib", "triton", "tensorflow")
PROBE_LIMIT = 10.0
"""Seconds for two; a probe takes milliseconds, but machines are busy and disks are cold."""

_SCRIPT = """
import importlib, importlib.metadata, json, sys, time
name, distribution, frameworks, hide = json.loads(sys.argv[1])
if hide:
    for framework in frameworks:
        sys.modules[framework] = None
from vllm_core.backend.manager import BackendManager
from vllm_core.backend import Probe
entries = importlib.metadata.entry_points(group="vllm_core")
entries = [e for e in entries if e.dist is not None and e.dist.name == distribution]
for entry in entries:
    entry.load()
probe_of = sys.argv[2]
module, _, function = probe_of.partition(":")
listed = [f for f in frameworks if sys.modules.get(f) is not None]
begin = time.perf_counter()
for _ in range(2):
    probe = getattr(importlib.import_module(module), function)()
seconds = time.perf_counter() - begin
print("\\n" + json.dumps({
    "listed": listed, "seconds": seconds, "is_probe": isinstance(probe, Probe),
    "devices": [(d.kind, d.memory_bytes) for d in probe.devices],
    "reason": str(probe.reason), "fix": str(probe.fix),
}))
"""


def listing(target: Target, rng: np.random.Generator) -> Evidence:
    """The plug-in is imported and its probe is called in a process that has seen no framework."""
    return _listed(target, "with its framework", hide=False)


def listing_bare(target: Target, rng: np.random.Generator) -> Evidence:
    """The same where no framework is installed."""
    return _listed(target, "without any framework", hide=True)


def _listed(target: Target, where: str, *, hide: bool) -> Evidence:
    info, evidence = target.source.info, Evidence()
    if info is None or target.source.distribution is None:
        require(callable(target.source.open), "the backend's opening function cannot be called")
        evidence.checks += 1
        evidence.notes.append("opened by a function: there is no listing to check")
        return evidence
    found = _ask([info.name, target.source.distribution, FRAMEWORKS, hide], info.probe, where)
    require(
        not found["listed"],
        f"listing the backend imports {', '.join(found['listed'])}: the plug-in's module must "
        "import no framework",
    )
    require(found["is_probe"], f"probe returned no Probe {where}")
    require(
        found["seconds"] < PROBE_LIMIT,
        f"the probe took {found['seconds']:.1f} s {where}: it must be cheap",
    )
    require(
        len(found["devices"]) > 0 or len(found["reason"]) > 5,
        f"the probe found no device {where} and tells no reason",
    )
    for kind, size in found["devices"]:
        require(
            bool(kind) and size >= 0,
            f"the probe names a device of kind {kind!r} with {size} bytes of memory {where}; "
            "memory that is not known is 0",
        )
    if found["devices"]:
        evidence += require_memory(target, found["devices"][0][1])
    evidence.checks += 4 + len(found["devices"])
    evidence.figures[f"probe {where}, s"] = found["seconds"]
    return evidence


def require_memory(target: Target, told: int) -> Evidence:
    """What the probe told of the device is about what the runtime computes on; 0 is not known."""
    if not told:
        return Evidence()
    with calling("memory"):
        total = target.runtime.memory().total
    require(
        told / 4 <= total <= told * 4,
        f"the probe names a device of {told / 2**30:.1f} GiB, the runtime computes on one of "
        f"{total / 2**30:.1f} GiB",
    )
    return Evidence(checks=1)


def _ask(arguments: list[Any], probe: str, where: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _SCRIPT, json.dumps(arguments), probe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=45, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"listing and probing took over 45 s {where}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"listing or probing failed {where}: {last} (a probe never raises)")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
