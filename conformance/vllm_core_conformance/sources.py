"""Finds the backend under test: by name, or as the open function of one under development.

Runs the vendor's code (plug-ins are imported, devices probed), so it belongs into a worker.

Knows: discovery of the core. Does not know: what is done with a backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from vllm_core.backend import Capabilities, OpenConfig, Runtime
from vllm_core.backend.manager import BackendManager, Choice, Discovered
from vllm_core.errors import BackendError
from vllm_core_conformance.target import Source


class NoDevice(Exception):
    """The backend is there, its hardware is not."""


class Unknown(Exception):
    """Nothing has this name."""


def resolve(text: str) -> Source:
    """`name` of a backend that `vllm-core doctor` lists, or `module:function`.

    NoDevice when its probe finds none, Unknown when there is no such backend, BackendError when it
    is broken.
    """
    module, colon, function = text.partition(":")
    if colon:
        return Source(text, _open_function(module, function))
    manager = BackendManager()
    found = manager.discover()
    backend = next((d for d in found if d.name == text), None)
    if backend is None:
        names = ", ".join(sorted(d.name for d in found))
        raise Unknown(
            f"there is no backend {text!r}; known are {names}; a backend under development is "
            "named as module:function"
        )
    if backend.error is not None:
        raise BackendError(f"backend {text!r} cannot be used: {backend.error}")
    if not backend.usable:
        why = backend.probe.reason if backend.probe else "its probe gave no answer"
        raise NoDevice(f"backend {text!r} found no device: {why or 'its probe says no more'}")
    return _source(manager, backend)


def _source(manager: BackendManager, backend: Discovered) -> Source:
    choice = Choice(backend, "named by the caller")

    def open_runtime(config: OpenConfig) -> Runtime:
        return manager.open(choice, config)

    return Source(
        backend.name,
        open_runtime,
        info=backend.info,
        distribution=backend.distribution,
        version=backend.version,
    )


def _open_function(module: str, function: str) -> Callable[[OpenConfig], Runtime]:
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is not None and (module + ".").startswith(error.name + "."):
            raise Unknown(f"there is no module {module!r} (for {module}:{function})") from error
        raise
    except AttributeError as error:
        raise Unknown(f"module {module!r} has no {function!r}") from error
    if not callable(found):
        raise Unknown(f"{module}:{function} is no function (OpenConfig) -> Runtime")
    opener: Callable[[OpenConfig], Runtime] = found
    return opener


def devices_of(source: Source) -> list[dict[str, Any]]:
    """What the backend's probe found; empty for an open function."""
    if source.info is None:
        return []
    module, _, function = source.info.probe.partition(":")
    probe = getattr(importlib.import_module(module), function)()
    return [asdict(device) for device in probe.devices]


def plain_capabilities(caps: Capabilities) -> dict[str, Any]:
    """Field -> plain data, sets as sorted lists."""
    found = {field.name: getattr(caps, field.name) for field in fields(caps)}
    return {
        name: sorted(value) if isinstance(value, (set, frozenset)) else value
        for name, value in found.items()
    }
