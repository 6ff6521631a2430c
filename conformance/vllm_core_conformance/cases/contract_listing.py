"""Case: listing a backend and its probe, in a process of their own.

Knows: entry points, probes, which modules are frameworks. Does not know: runtimes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np

from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.target import Target

FRAMEWORKS = ("torch", "jax", "jaxlib", "triton", "tensorflow")
PROBE_LIMIT = 10.0
"""Seconds; a probe takes milliseconds, but machines are busy and disks are cold."""

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
probe = getattr(importlib.import_module(module), function)()
seconds = time.perf_counter() - begin
print("\\n" + json.dumps({
    "listed": listed, "seconds": seconds, "is_probe": isinstance(probe, Probe),
    "devices": len(probe.devices), "reason": str(probe.reason), "fix": str(probe.fix),
}))
"""


def listing(target: Target, rng: np.random.Generator) -> Evidence:
    """The plug-in is imported and its probe is called where frameworks are there, and where they
    are hidden."""
    info, evidence = target.source.info, Evidence()
    if info is None or target.source.distribution is None:
        require(callable(target.source.open), "the backend's opening function cannot be called")
        evidence.checks += 1
        evidence.notes.append("opened by a function: there is no listing to check")
        return evidence
    for hide in (False, True):
        where = "without any framework" if hide else "with its framework"
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
            found["devices"] > 0 or len(found["reason"]) > 5,
            f"the probe found no device {where} and tells no reason",
        )
        evidence.checks += 4
        evidence.figures[f"probe {where}, s"] = found["seconds"]
    return evidence


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
