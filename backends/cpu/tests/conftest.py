"""The library that tests run is the one of these sources: built in place when it is not.

Knows: the build script, compilers and emulators. Does not know: kernels.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.toolchain import BACKEND


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
