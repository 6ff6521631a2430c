"""A planted fault: a backend that is wrong in one known way, and what the suite must say of it.

Knows: what a fault is, where the faults are. Does not know: what any of them does.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from vllm_core.backend import OpenConfig, Runtime
from vllm_core_conformance.target import Source
from vllm_core_conformance.zoo.plugin import Plugin, install

MODULES = (
    "attention",
    "numerics",
    "kv",
    "programs",
    "memory",
    "lifecycle",
    "lies",
    "contract",
    "manifest",
    "trivial",
    "ops",
    "moe",
    "sampling",
    "stepping",
    "weights",
    "quantised",
    "kv8",
    "serving",
)
"""Modules of `zoo.faults`, each with FAULTS, a tuple of `Fault`."""


@dataclass(frozen=True)
class Fault:
    """One wrong backend."""

    name: str
    """snake_case, unique over all areas."""
    area: str
    """As the areas of cases: attention, kv, ops, ..."""
    says: str
    """What its author did wrong, in one sentence."""
    open: Callable[[OpenConfig], Runtime]
    """Opens the wrong backend, as a manifest's `open` does."""
    worst: bool = False
    """One of those that the profile `smoke` alone must catch."""
    expected: frozenset[str] = frozenset({"fail"})
    """Statuses of which each killing case must show one."""
    profiles: tuple[str, ...] = ("core",)
    """Profiles that must catch it."""
    dangerous: bool = False
    """It ends, blocks or kills its process: it runs under the supervisor only."""
    plugin: Plugin | None = None
    """It is wrong before it is opened: found by its entry point, and opened as that says."""

    def source(self) -> Source:
        """Where a Target opens it."""
        if self.plugin is None:
            return Source(self.name, self.open)
        return install(self.name, self.plugin)


@cache
def all_faults() -> dict[str, Fault]:
    """By name, in the order of MODULES."""
    found: dict[str, Fault] = {}
    for module_name in MODULES:
        path = f"{__package__}.faults.{module_name}"
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            continue
        for fault in module.FAULTS:
            if fault.name in found:
                raise AssertionError(f"two faults are called {fault.name}")
            found[fault.name] = fault
    return found


def select_faults(patterns: Iterable[str]) -> list[Fault]:
    """Faults whose name or area matches any of the globs."""
    wanted = tuple(patterns)
    return [
        fault
        for fault in all_faults().values()
        if any(fnmatch.fnmatch(fault.name, p) or fnmatch.fnmatch(fault.area, p) for p in wanted)
    ]
