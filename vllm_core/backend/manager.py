"""Finds backends, tells why each is usable or not, and opens the chosen one.

pluggy's own entry-point loader stops at the first plug-in that fails to import; here each is
registered in a try of its own, so that a broken one never hides the others.

Knows: entry points, probes, versions, the choice. Does not know: what a backend does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pluggy

from vllm_core import envs
from vllm_core.backend import builtin
from vllm_core.backend.hookspecs import GROUP, Hooks
from vllm_core.backend.interface import (
    SEAM_VERSION,
    BackendInfo,
    DeviceInfo,
    OpenConfig,
    Probe,
    Runtime,
)
from vllm_core.backend.lies import missing_methods
from vllm_core.errors import BackendError, VllmCoreError

__all__ = ["BackendManager", "Choice", "DeviceInfo", "Discovered", "Probe"]

OWN = "vllm-core"
"""The distribution that brings the built-in backends."""


_INFO_TYPES = {"name": str, "api": str, "summary": str, "priority": int, "probe": str, "open": str}


class EntryPoint(Protocol):
    """The part of importlib.metadata.EntryPoint that is used."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...
    def load(self) -> Any: ...


@dataclass(frozen=True)
class Discovered:
    """One backend, or one plug-in that never got to say which."""

    name: str
    summary: str = ""
    distribution: str | None = None
    version: str | None = None
    api: str = ""
    info: BackendInfo | None = None
    probe: Probe | None = None
    error: str | None = None
    """One line: why it cannot be used at all."""
    traceback: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it works and found a device."""
        return self.error is None and self.probe is not None and bool(self.probe.devices)


@dataclass(frozen=True)
class Choice:
    """The backend to open, and why it was chosen."""

    backend: Discovered
    reason: str


class BackendManager:
    """Discovers once; `entry_points` is for tests."""

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        self._entry_points = (
            list(entry_points)
            if entry_points is not None
            else list(importlib.metadata.entry_points(group=GROUP))
        )
        self._found: list[Discovered] | None = None

    def discover(self) -> list[Discovered]:
        """Every backend, by priority; broken plug-ins last. Never raises for a plug-in's fault."""
        if self._found is None:
            found = _backends_of(builtin, "builtin", OWN, _version(OWN))
            for entry in self._entry_points:
                found += _load(entry)
            found = _without_doubles(found)
            found.sort(key=lambda d: (d.error is not None, -(d.info.priority if d.info else 0)))
            self._found = found
        return self._found

    def choose(self, name: str | None = None) -> Choice:
        """By name, else by environment, else the usable one with the highest priority. BackendError
        otherwise."""
        found = self.discover()
        wanted, reason = name, "named by the caller"
        if wanted is None and envs.backend() is not None:
            wanted, reason = envs.backend(), "named by VLLM_CORE_BACKEND"
        if wanted is not None:
            return Choice(self._named(wanted), reason)
        for backend in found:
            if backend.usable and backend.info is not None and not backend.info.only_by_name:
                return Choice(
                    backend, f"highest priority of those that found a device: {_why(backend)}"
                )
        raise BackendError(
            "no backend found a device; install one, for example: pip install 'vllm-core[cpu]' "
            "(`vllm-core doctor` tells why each was refused)"
        )

    def open(self, choice: Choice, config: OpenConfig) -> Runtime:
        """Opens the chosen backend only."""
        info = choice.backend.info
        assert info is not None
        try:
            runtime = _resolve(info.open)(config)
        except VllmCoreError:
            raise
        except Exception as error:
            raise BackendError(
                f"backend {info.name!r} cannot be opened: {_one_line(error)}; "
                "`vllm-core doctor` tells what to install"
            ) from error
        if not isinstance(runtime, Runtime):
            raise BackendError(
                f"backend {info.name!r}: {info.open} returned {type(runtime).__name__}, "
                "not a Runtime"
            )
        # the core's own are held to the seam by its tests; null has no numerics on purpose
        lies = [] if choice.backend.distribution == OWN else missing_methods(runtime)
        if lies:
            runtime.close()
            raise BackendError(
                f"backend {info.name!r} promises what it does not have: {'; '.join(lies)}"
            )
        return runtime

    def inspect(self, backend: Discovered) -> str | None:
        """Why a backend that found a device cannot serve all the same: it is opened and closed
        again."""
        if not backend.usable:
            return backend.error
        try:
            self.open(Choice(backend, "to inspect it"), OpenConfig(dtype="auto")).close()
        except Exception as error:
            return str(error) if isinstance(error, VllmCoreError) else _one_line(error)
        return None

    def _named(self, name: str) -> Discovered:
        found = self.discover()
        backend = next((d for d in found if d.name == name), None)
        if backend is None:
            names = ", ".join(sorted(d.name for d in found))
            raise BackendError(
                f"there is no backend {name!r}; known are {names}; "
                f"perhaps: pip install vllm-core-{name}"
            )
        if backend.error is not None:
            raise BackendError(f"backend {name!r} cannot be used: {backend.error}")
        if not backend.usable:
            probe = backend.probe
            why = probe.reason if probe else "its probe gave no answer"
            fix = f"; try: {probe.fix}" if probe and probe.fix else ""
            raise BackendError(f"backend {name!r} found no device: {why}{fix}")
        return backend


def _why(backend: Discovered) -> str:
    probe = backend.probe
    return probe.reason if probe and probe.reason else f"{backend.name} works"


def _without_doubles(found: list[Discovered]) -> list[Discovered]:
    """Of those that claim one name the first keeps it; the others say who has it."""
    owners: dict[str, Discovered] = {}
    judged = []
    for backend in found:
        owner = owners.setdefault(backend.name, backend) if backend.error is None else backend
        if owner is not backend:
            who = owner.distribution or "another plug-in"
            error = f"the name {backend.name!r} is taken by {who}; uninstall one of the two"
            backend = replace(backend, probe=None, error=error)
        judged.append(backend)
    return judged


def _load(entry: EntryPoint) -> list[Discovered]:
    """The backends of one entry point, or one row that says why it is broken."""
    distribution = getattr(entry, "dist", None)
    name = getattr(distribution, "name", None)
    version = getattr(distribution, "version", None)
    try:
        plugin = entry.load()
        return _backends_of(plugin, entry.name, name, version)
    except (Exception, SystemExit) as error:
        line = _one_line(error)
        return [
            Discovered(
                entry.name,
                summary=entry.value,
                distribution=name,
                version=version,
                error=f"the plug-in failed to import: {line}",
                traceback=traceback.format_exc(),
            )
        ]


def _backends_of(
    plugin: Any, plugin_name: str, distribution: str | None, version: str | None
) -> list[Discovered]:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    manager.register(plugin, name=plugin_name)
    manager.check_pending()
    infos = [info for group in manager.hook.vllm_core_backends() for info in group]
    if not infos:
        return [
            Discovered(
                plugin_name,
                distribution=distribution,
                version=version,
                error="the plug-in names no backend (hook vllm_core_backends)",
            )
        ]
    return [
        _judge(info, distribution, version)
        if isinstance(info, BackendInfo)
        else Discovered(
            plugin_name,
            distribution=distribution,
            version=version,
            error=f"vllm_core_backends returned {type(info).__name__}, not a BackendInfo",
        )
        for info in infos
    ]


def _judge(info: BackendInfo, distribution: str | None, version: str | None) -> Discovered:
    """Checks what it says of itself and the version of the seam, then probes."""
    wrong = [name for name, kind in _INFO_TYPES.items() if type(getattr(info, name)) is not kind]
    if wrong:
        return Discovered(
            str(info.name),
            distribution=distribution,
            version=version,
            error=f"its BackendInfo has {getattr(info, wrong[0])!r:.40} as {wrong[0]}, "
            f"which must be {_INFO_TYPES[wrong[0]].__name__}",
        )
    row: dict[str, Any] = {
        "name": info.name,
        "summary": info.summary,
        "distribution": distribution,
        "version": version,
        "api": info.api,
        "info": info,
    }
    try:
        fits = _in_range(SEAM_VERSION, info.api)
    except ValueError as error:
        return Discovered(**row, error=f"its seam range {info.api!r} cannot be read: {error}")
    if not fits:
        ours = ".".join(map(str, SEAM_VERSION))
        return Discovered(
            **row,
            error=f"it speaks seam {info.api}, this core speaks {ours}; "
            f"install matching versions of vllm-core and {distribution or info.name}",
        )
    try:
        probe = _resolve(info.probe)()
    except (Exception, SystemExit) as error:
        return Discovered(
            **row, error=f"its probe failed: {_one_line(error)}", traceback=traceback.format_exc()
        )
    if not isinstance(probe, Probe):
        return Discovered(**row, error=f"its probe returned {type(probe).__name__}, not a Probe")
    if not _are_devices(probe.devices):
        return Discovered(
            **row, error=f"its probe found {probe.devices!r:.40}, which is no list of DeviceInfo"
        )
    return Discovered(**row, probe=probe)


def _are_devices(devices: object) -> bool:
    return isinstance(devices, (list, tuple)) and all(
        isinstance(d, DeviceInfo) and isinstance(d.memory_bytes, int) for d in devices
    )


def _resolve(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _in_range(version: tuple[int, ...], text: str) -> bool:
    """ ">=0.1,<0.2" over dotted numbers."""
    for clause in filter(None, (part.strip() for part in text.split(","))):
        operator = next((op for op in (">=", "<=", "==", "<", ">") if clause.startswith(op)), None)
        if operator is None:
            raise ValueError(f"{clause!r} has no operator")
        bound = tuple(int(number) for number in clause[len(operator) :].strip().split("."))
        size = max(len(bound), len(version))
        ours = version + (0,) * (size - len(version))
        theirs = bound + (0,) * (size - len(bound))
        fits = {
            ">=": ours >= theirs,
            "<=": ours <= theirs,
            "==": ours == theirs,
            "<": ours < theirs,
            ">": ours > theirs,
        }[operator]
        if not fits:
            return False
    return True


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
