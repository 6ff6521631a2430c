"""Plug-ins that are wrong before they are opened.

Knows: manifests and probes. Does not know: cases, runtimes.
"""

from __future__ import annotations

from vllm_core.bindings.numpy import open_runtime
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.plugin import Plugin


def _wrong(name: str, says: str, plugin: Plugin) -> Fault:
    return Fault(name, "manifest", says, open_runtime, plugin=plugin)


FAULTS = (
    _wrong(
        "manifest_imports_torch",
        "listing the plug-in imports torch",
        Plugin(head="import torch"),
    ),
    _wrong(
        "manifest_device_of_negative_memory",
        "where memory cannot be told, the probe says -1",
        Plugin(probe="total = -1"),
    ),
    _wrong(
        "manifest_device_without_kind",
        "the device that the probe names has no kind",
        Plugin(probe='return Probe([DeviceInfo(0, "", "planted", total)])'),
    ),
    _wrong(
        "manifest_memory_in_kilobytes",
        "the probe tells its memory in KiB",
        Plugin(probe="total //= 1024"),
    ),
    _wrong(
        "manifest_probe_answers_once",
        "a probe that finds its device taken, by its own first call, raises",
        Plugin(head="calls = []", probe="calls.append(1); assert len(calls) < 2"),
    ),
)
