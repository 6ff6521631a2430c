"""The backends that live in the core: numpy (the law) and null (no numerics).

Knows: their names. Does not know: their code, until one is opened.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_core.backend.hookspecs import hookimpl
from vllm_core.backend.interface import BackendInfo, DeviceInfo, Probe

API = ">=0.1,<0.2"


@hookimpl
def vllm_core_backends() -> Sequence[BackendInfo]:
    return [
        BackendInfo(
            name="reference",
            api=API,
            summary="numpy, float32 or float64; the law that the others are compared with; slow",
            priority=-10,
            probe="vllm_core.backend.builtin:probe",
            open="vllm_core.bindings.numpy:open_runtime",
            only_by_name=True,
        ),
        BackendInfo(
            name="jax",
            api=API,
            summary="portable ops on whatever device jax drives; not tuned",
            priority=-5,
            probe="vllm_core.bindings.probes:probe_jax",
            open="vllm_core.bindings.jax:open_runtime",
            only_by_name=True,
        ),
        BackendInfo(
            name="null",
            api=API,
            summary="no numerics: answers at once with a fixed token; for tests of the host side",
            priority=-20,
            probe="vllm_core.backend.builtin:probe",
            open="vllm_core.backend.null:open_runtime",
            only_by_name=True,
        ),
    ]


def probe() -> Probe:
    """numpy is always there."""
    return Probe([DeviceInfo(0, "host", "any", 0)], reason="needs nothing but numpy")
