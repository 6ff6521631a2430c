"""The C++ programs of csrc_tests/, each on every instruction set.

A file csrc_tests/test_*.cpp is a test; what it may use is in csrc_tests/check.h. They run on this
processor, and under qemu on an old x86 one and on a 64-bit Arm one, as far as tools are here.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.toolchain import BACKEND, run

PROGRAMS = sorted(path.stem for path in (BACKEND / "tests/csrc_tests").glob("test_*.cpp"))
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-pthread")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"
X86_EMULATOR = "qemu-x86_64-static"
LACKS = 77  # exit code: this processor cannot

on_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="NOT CHECKED: kernels of x86_64, on another machine"
)


def compile_program(program: str, compiler: str, library: Path, folder: Path) -> Path:
    """Next to nothing is compiled here: the kernels are in the library."""
    source, out = BACKEND / f"tests/csrc_tests/{program}.cpp", folder / program
    include = BACKEND / "vllm_core_cpu/csrc"
    done = run(
        *(*compiler.split(), *FLAGS, "-I", include, source, library),
        *(f"-Wl,-rpath,{library.parent}", "-o", out),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def arm_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [tool for tool in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"NOT CHECKED on Arm: no {', no '.join(missing)} on this machine")
    out = tmp_path_factory.mktemp("aarch64") / "_kernels.so"
    done = run("python3", BACKEND / "hatch_build.py", "--output", out, CXX=ARM_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "does not know" not in done.stdout, done.stdout
    return out


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "neon_bf16"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_passes_on_this_processor(
    hatch_build: ModuleType, library: Path, tmp_path: Path, program: str, isa: str
) -> None:
    if isa not in hatch_build.INSTRUCTION_SETS[platform.machine()]:
        pytest.skip(f"NOT CHECKED natively: {isa} is not of {platform.machine()}")
    built = compile_program(program, os.environ.get("CXX", "g++"), library, tmp_path)
    done = run(built, isa)
    if done.returncode == LACKS:
        pytest.skip(f"NOT CHECKED: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("isa", ["generic", "neon_bf16"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_passes_on_an_emulated_arm(
    arm_library: Path, tmp_path: Path, program: str, isa: str
) -> None:
    built = compile_program(program, ARM_COMPILER, arm_library, tmp_path)
    done = run(ARM_EMULATOR, "-cpu", "max", "-L", ARM_LIBRARIES, built, isa, "few")
    assert done.returncode == 0, done.stdout + done.stderr


@on_x86
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_old_processor_runs_the_generic_kernels_and_refuses_the_others(
    library: Path, tmp_path: Path, program: str
) -> None:
    """Finds an instruction that a function of one set took from another."""
    if shutil.which(X86_EMULATOR) is None:
        pytest.skip(f"NOT CHECKED on an old x86 processor: no {X86_EMULATOR} on this machine")
    built = compile_program(program, os.environ.get("CXX", "g++"), library, tmp_path)
    old = (X86_EMULATOR, "-cpu", "Nehalem", built)
    assert run(*old, "avx2", "few").returncode == LACKS
    done = run(*old, "generic", "few")
    assert done.returncode == 0, done.stdout + done.stderr
