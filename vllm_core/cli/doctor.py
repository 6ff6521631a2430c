"""Every backend: found or why not and the command that mends it, versions, devices, capabilities.

A backend that finds a device is opened too, so that the verdict is more than a hope; those of the
core are not, since that would wake drivers for nothing: what they declare is read.
Exit code 0 when one works that does not have to be asked for by name, else 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

import vllm_core
from vllm_core.cli.description import format_bytes, format_fields
from vllm_core.errors import VllmCoreError

if TYPE_CHECKING:
    from vllm_core.backend.capabilities import Capabilities
    from vllm_core.backend.manager import BackendManager, Discovered

SUMMARY = "what was found on this machine, and how to mend what is missing"

DISTRIBUTIONS = ("torch", "jax", "numpy", "transformers", "tokenizers", "safetensors", "gguf")
"""Their versions are shown without importing them."""
OF_THE_DEVICE = ("default_dtype", "shares_host_memory")
"""Capabilities that a backend of the core knows only once it is opened."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    from vllm_core.backend.interface import SEAM_VERSION
    from vllm_core.backend.manager import BackendManager

    manager = BackendManager()
    backends = [_inspect(manager, backend) for backend in manager.discover()]
    is_ready, verdict = _judge(manager, backends)
    report: dict[str, Any] = {
        "vllm_core": vllm_core.__version__,
        "seam": ".".join(map(str, SEAM_VERSION)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "distributions": {name: _version(name) for name in DISTRIBUTIONS},
        "backends": backends,
        "is_ready": is_ready,
        "verdict": verdict,
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report, with_tracebacks=getattr(args, "debug", False))
    return 0 if is_ready else 1


def _inspect(manager: BackendManager, backend: Discovered) -> dict[str, Any]:
    """One backend as plain data; a plug-in that found a device is opened, to see what it declares.

    Of the core's own what they declare before a device is known is read, less what may change then.
    """
    from vllm_core.backend.interface import OpenConfig
    from vllm_core.backend.manager import OWN, Choice

    facts: dict[str, Any] = {
        "name": backend.name,
        "summary": backend.summary,
        "distribution": backend.distribution,
        "version": backend.version,
        "seam": backend.api,
        "devices": [asdict(d) for d in backend.probe.devices] if backend.probe else [],
        "reason": backend.probe.reason if backend.probe else "",
        "fix": backend.probe.fix if backend.probe else "",
        "only_by_name": backend.info is not None and backend.info.only_by_name,
        "capabilities": None,
        "error": backend.error,
        "traceback": backend.traceback,
    }
    if not backend.usable:
        return facts
    try:
        if backend.distribution == OWN and backend.info is not None:
            module = import_module(backend.info.open.partition(":")[0])
            declared = _plain(module.CAPABILITIES)
            facts["capabilities"] = {k: v for k, v in declared.items() if k not in OF_THE_DEVICE}
            return facts
        runtime = manager.open(Choice(backend, "to see what it declares"), OpenConfig(dtype="auto"))
        facts["capabilities"] = _plain(runtime.caps)
        runtime.close()
    except Exception as error:  # a plug-in's fault must not hide the others
        is_told = isinstance(error, VllmCoreError)
        facts["error"] = str(error) if is_told else f"it cannot be opened: {error!r}"
        facts["traceback"] = traceback.format_exc()
    return facts


def _judge(manager: BackendManager, backends: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether the engine has a backend without being told which, in words."""
    try:
        choice = manager.choose()
    except VllmCoreError as error:
        return False, f"not ready: {error}"
    name = choice.backend.name
    if any(b["error"] is None for b in backends if b["name"] == name):
        return True, f"ready: the engine takes {name} ({choice.reason})"
    works = [b["name"] for b in backends if b["capabilities"] is not None and not b["only_by_name"]]
    instead = f"ready with --backend {works[0]}" if works else "not ready"
    return bool(works), f"{instead}: without a name the engine takes {name}, which is broken"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _plain(capabilities: Capabilities) -> dict[str, Any]:
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in asdict(capabilities).items()
    }


def _print_report(report: Mapping[str, Any], *, with_tracebacks: bool) -> None:
    installed = ", ".join(
        f"{name} {version or '(not installed)'}"
        for name, version in report["distributions"].items()
    )
    system = (
        f"vllm-core {report['vllm_core']}, seam {report['seam']}, "
        f"Python {report['python']}, {report['system']}"
    )
    print(format_fields("versions", [system, installed]))
    for backend in report["backends"]:
        print(format_fields(backend["name"], _backend_lines(backend)))
        if with_tracebacks and backend["traceback"]:
            print(backend["traceback"].rstrip())
    print(report["verdict"])


def _backend_lines(backend: Mapping[str, Any]) -> list[str]:
    from vllm_core.backend.manager import OWN

    origin = " ".join(filter(None, (backend["distribution"], backend["version"])))
    lines = [f"{backend['summary']} ({origin or 'unknown origin'})"]
    if backend["error"] is not None:
        lines.append(f"broken: {backend['error']}")
    for device in backend["devices"]:
        memory = f", {format_bytes(device['memory_bytes'])}" if device["memory_bytes"] else ""
        lines.append(f"found: {device['kind']} {device['index']}, {device['arch']}{memory}")
    if backend["only_by_name"] and backend["devices"]:
        lines.append(f"runs only when asked for: --backend {backend['name']}")
    if not backend["devices"] and backend["error"] is None:
        lines.append(f"no device: {backend['reason']}")
    if backend["fix"]:
        lines.append(f"to mend it: {backend['fix']}")
    if backend["capabilities"] is not None:
        is_own = backend["distribution"] == OWN
        lines += (_short_line if is_own else _capability_lines)(backend["capabilities"])
    return lines


def _short_line(capabilities: Mapping[str, Any]) -> list[str]:
    """What there is to choose from, of a backend that comes with the core."""
    told = {name: capabilities[name] for name in ("dtypes", "native_schemes", "kv_dtypes")}
    return [", ".join(f"{name} {' '.join(value) or 'none'}" for name, value in told.items())]


def _capability_lines(capabilities: Mapping[str, Any]) -> list[str]:
    """Values in one line, bits that are declared in the next, what is not declared in the last."""
    values = [
        f"{name} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in capabilities.items()
        if value and value is not True
    ]
    bits = [name for name, value in capabilities.items() if value is True]
    absent = [name for name, value in capabilities.items() if not value]
    return [", ".join(values), f"with {', '.join(bits)}", f"without {', '.join(absent)}"]
