"""Hooks of the entry-point group "vllm_core". They serve discovery only; no hot path goes through
them.

Knows: hook names. Does not know: who implements them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pluggy

from vllm_core.backend.interface import BackendInfo

GROUP = "vllm_core"

_F = TypeVar("_F", bound=Callable[..., Any])
_spec = pluggy.HookspecMarker(GROUP)
_impl = pluggy.HookimplMarker(GROUP)


def hookimpl(function: _F) -> _F:
    """Marks a plug-in's implementation of a hook."""
    marked: _F = _impl(function)
    return marked


class Hooks:
    """What a plug-in module may define."""

    @_spec
    def vllm_core_backends(self) -> Sequence[BackendInfo]:  # type: ignore[empty-body]
        """Backends as plain data; imports no framework."""
