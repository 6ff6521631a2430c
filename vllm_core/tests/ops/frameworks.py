"""Opens each binding for the tests that hold every framework to one law."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from vllm_core.backend import OpenConfig, Program, Runtime

BINDINGS = ("numpy", "torch", "jax")


def open_binding(name: str, dtype: str = "float32") -> Runtime:
    """The runtime of one binding; the test is skipped only where the framework itself is
    missing."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: its binding was not checked")
    return _open(name, dtype)


@lru_cache
def _open(name: str, dtype: str) -> Runtime:
    module = importlib.import_module(f"vllm_core.bindings.{name}")
    runtime: Runtime = module.open_runtime(OpenConfig(dtype=dtype, threads=1))
    return runtime


def compiled(runtime: Runtime, fn: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """fn as the runtime runs programs, with numpy results."""
    run = runtime.compile(Program("score", fn), None)
    return lambda *args: runtime.fetch(run(*args)).wait()
