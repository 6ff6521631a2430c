"""`vllm_core_conformance.zoo.open:NAME` opens the fault or the honest backend of that name.

Knows: names. Does not know: what they do.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_core.backend import OpenConfig, Runtime
from vllm_core_conformance.zoo.fault import all_faults
from vllm_core_conformance.zoo.honest import HONEST


def __getattr__(name: str) -> Callable[[OpenConfig], Runtime]:
    if name in HONEST:
        return HONEST[name]
    fault = all_faults().get(name)
    if fault is None:
        raise AttributeError(f"no fault and no honest backend is called {name!r}")
    return fault.open
