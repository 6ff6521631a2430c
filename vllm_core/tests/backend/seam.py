"""The seam's public surface as text: python -m vllm_core.tests.backend.seam >
vllm_core/tests/backend/seam.txt"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from enum import IntEnum
from types import ModuleType
from typing import Any

import vllm_core.backend
import vllm_core.ops
from vllm_core.backend import SEAM_VERSION

NOT_THE_SEAM = (
    "builtin",
    "cases",
    "catalogue",
    "lies",
    "manager",
    "null",
    "reference",
    "sampling",
    "stepping",
)
"""Modules that a plug-in has no business with: built-in backends, laws, and what stands behind
methods of Ops."""


def surface() -> str:
    """Every public class, method, field, function and constant of vllm_core.ops and
    vllm_core.backend."""
    lines = [f"seam {'.'.join(map(str, SEAM_VERSION))}"]
    for package in (vllm_core.ops, vllm_core.backend):
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            if info.name not in NOT_THE_SEAM:
                lines += _module(importlib.import_module(f"{package.__name__}.{info.name}"))
    return "\n".join(lines) + "\n"


def _module(module: ModuleType) -> Iterator[str]:
    yield ""
    yield module.__name__
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if getattr(value, "__module__", module.__name__) != module.__name__:
            continue
        if inspect.isclass(value):
            yield from _class(name, value)
        elif inspect.isfunction(value):
            yield f"  def {name}{_signature(value)}"
        elif name.isupper() and name != "TYPE_CHECKING":
            yield f"  {name} = {value!r}"


def _class(name: str, cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__)
    yield f"  class {name}({bases})"
    if issubclass(cls, IntEnum):
        yield from (f"    {member.name} = {int(member)}" for member in cls)
        return
    defaults = {}
    if dataclasses.is_dataclass(cls):
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for field, annotation in inspect.get_annotations(cls).items():
        default = defaults.get(field, dataclasses.MISSING)
        shown = "" if default is dataclasses.MISSING else f" = {default!r}"
        yield f"    {field}: {annotation}{shown}"
    for method, value in sorted(vars(cls).items()):
        if method.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"    property {method}"
        elif inspect.isfunction(value):
            is_abstract = getattr(value, "__isabstractmethod__", False)
            yield f"    {'abstract ' if is_abstract else ''}def {method}{_signature(value)}"


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


if __name__ == "__main__":
    sys.stdout.write(surface())
