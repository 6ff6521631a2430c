"""The cases, one module per area. Each module has CASES, a tuple of `Case`.

Knows: where cases are. Does not know: what they do.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache

from vllm_core_conformance.case import PROFILES, Case

MODULES = (
    "attention",
    "hybrid",
    "kv",
    "ops",
    "weights",
    "stepping",
    "sampling",
    "programs",
    "memory",
    "contract",
    "errors",
    "serving",
    "deterministic",
    "quantised",
    "distributed",
    "performance",
)


@cache
def all_cases() -> dict[str, Case]:
    """By id, in the order of MODULES."""
    found: dict[str, Case] = {}
    for name in MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        for case in module.CASES:
            if case.id in found:
                raise AssertionError(f"two cases are called {case.id}")
            unknown = case.profiles - set(PROFILES)
            if unknown or not case.profiles:
                raise AssertionError(f"{case.id}: profiles {sorted(unknown) or 'missing'}")
            found[case.id] = case
    return found


def select(profiles: Iterable[str]) -> list[Case]:
    """Cases of any of the profiles."""
    wanted = set(profiles)
    return [case for case in all_cases().values() if case.profiles & wanted]
