"""The library that tests run is the one of these sources: built in place when it is not.

Knows: the build script, instruction sets. Does not know: what kernels compute.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.toolchain import BACKEND
from vllm_core_cpu import native
from vllm_core_cpu.ops import CpuOps


@pytest.fixture(scope="session")
def hatch_build() -> ModuleType:
    """backends/cpu/hatch_build.py as a module."""
    spec = importlib.util.spec_from_file_location("hatch_build", BACKEND / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library(hatch_build: ModuleType) -> Path:
    """The library, of these sources."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"NOT CHECKED: the CPU kernels; there is no C++ compiler ({compiler})")
    hatch_build.build_in_place()
    path: Path = hatch_build.LIBRARY
    return path


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "neon_bf16"])
def ops(library: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuOps:
    """The op table on one thread, with the kernels of each instruction set in turn."""
    best = native.find(library)
    assert isinstance(best, native.Native)
    if request.param not in best.usable:
        pytest.skip(f"NOT CHECKED on {request.param}: this processor or build lacks it")
    monkeypatch.setenv("VLLM_CORE_CPU_ISA", request.param)
    found = native.find(library)
    assert isinstance(found, native.Native)
    found.set_threads(1)
    return CpuOps(found, lambda shape, dtype: torch.empty(shape, dtype=dtype), torch.device("cpu"))
