"""A wrong manifest: a plug-in that lies or stumbles before any runtime is open.

It is written to disk as a distribution with a real entry point, so that it is found as a vendor's
is found, by this process and by those that it starts.

Knows: what an installed distribution looks like. Does not know: what is wrong with it.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_core_conformance.sources import resolve
from vllm_core_conformance.target import Source

_METADATA = "Metadata-Version: 2.1\nName: planted-{name}\nVersion: 1\n"
_ENTRY_POINT = "[vllm_core]\n{name} = planted_{name}\n"
_MODULE = '''
"""Planted."""
{head}

from vllm_core.backend import BackendInfo, DeviceInfo, Probe, hookimpl
from vllm_core.bindings import machine


@hookimpl
def vllm_core_backends():
    return [
        BackendInfo(
            name="{name}",
            api=">=0.1,<0.2",
            summary={summary!r},
            priority=-1,
            probe="planted_{name}:probe",
            open="vllm_core.bindings.numpy:open_runtime",
        )
    ]


def probe():
    total, _ = machine.memory()
    {probe}
    return Probe([DeviceInfo(0, "cpu", "planted", total)], reason="planted")
'''


@dataclass(frozen=True)
class Plugin:
    """What differs from an honest one."""

    head: str = ""
    """At the top of the module."""
    probe: str = "pass"
    """One statement, before the probe answers; `total` is the memory that it will tell."""
    summary: str = "numpy, planted"


@cache
def install(name: str, plugin: Plugin) -> Source:
    """Writes the plug-in where this process and its children find it, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="planted-")
    atexit.register(folder.cleanup)
    place = Path(folder.name)
    info = place / f"planted_{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(_METADATA.format(name=name))
    (info / "entry_points.txt").write_text(_ENTRY_POINT.format(name=name))
    (place / f"planted_{name}.py").write_text(_MODULE.format(name=name, **vars(plugin)))
    sys.path.insert(0, folder.name)
    environment = os.environ  # noqa: TID251 - what the children inherit
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder.name, before)))
    importlib.invalidate_caches()
    return resolve(name)
