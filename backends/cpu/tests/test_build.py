"""The build script: what it makes of compilers that lack something, and how seldom it compiles."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="NOT CHECKED: no g++")


def compiler_script(folder: Path, refuse: str) -> str:
    """g++, but for arguments that match `refuse`: as an old one, or a broken one."""
    script = folder / "c++"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in {refuse}) echo "error: no" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_without_a_compiler_the_error_names_what_was_looked_for(
    hatch_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        hatch_build.BuildError, match=r"no C\+\+ compiler.*no c\+\+, g\+\+ or clang"
    ):
        hatch_build.find_compiler()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(hatch_build.BuildError, match=r"/nowhere/g\+\+ cannot be started"):
        hatch_build.find_compiler()


@NEEDS_COMPILER
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(
    hatch_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "*-mavx2*|*+bf16*"))
    out = tmp_path / "_kernels.so"
    built = hatch_build.build(out, hatch_build.find_compiler())
    assert built.instruction_sets == ["generic"]
    assert built.left_out
    assert "the compiler does not know" in hatch_build.summary(built)
    symbols = subprocess.run(["nm", "-D", out], capture_output=True, text=True, check=True).stdout
    defined = [line.split()[-1] for line in symbols.splitlines() if " T " in line]
    assert defined and all(name.startswith("vc_") for name in defined), defined


@NEEDS_COMPILER
def test_sources_that_do_not_compile_are_an_error_and_leave_the_old_library(
    hatch_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "*isa.cpp*"))
    out = tmp_path / "_kernels.so"
    out.write_text("old")
    with pytest.raises(hatch_build.BuildError, match=r"(?s)compiling for \w+ failed:.*error: no"):
        hatch_build.build(out, hatch_build.find_compiler())
    assert out.read_text() == "old"


@NEEDS_COMPILER
def test_what_is_up_to_date_is_not_built_again_unless_something_changed(
    hatch_build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = hatch_build.find_compiler()
    out = tmp_path / "_kernels.so"
    key = hatch_build._key(compiler, None)
    out.write_text(f"... {key} ...")
    assert hatch_build.summary(hatch_build.build(out, compiler)) == "_kernels.so is up to date"
    assert hatch_build._key(compiler._replace(version="1"), None) != key
    assert hatch_build._key(compiler, "avx2") != key
    sources = tmp_path / "csrc"
    shutil.copytree(hatch_build.SOURCES, sources)
    monkeypatch.setattr(hatch_build, "SOURCES", sources)
    assert hatch_build._key(compiler, None) == key
    (sources / "simd.h").write_text("")
    assert hatch_build._key(compiler, None) != key


def test_each_instruction_set_contains_the_one_before_it(hatch_build: ModuleType) -> None:
    """The linker keeps the first of equal functions: it must run wherever a later one would."""
    for sets in hatch_build.INSTRUCTION_SETS.values():
        flags = [set(x) for x in sets.values()]
        assert all(before <= after for before, after in pairwise(flags))


def test_an_interface_that_cannot_be_mirrored_is_refused(hatch_build: ModuleType) -> None:
    read = hatch_build.read_interface
    text = (
        "struct A {\n  const void* x;  // y\n  int64_t n, k;\n  void (*f)(float a, const A* b);\n};"
    )
    assert read(text) == {"A": [("x", "p"), ("n", "l"), ("k", "l"), ("f", "v(fp)")]}
    with pytest.raises(hatch_build.BuildError, match="double"):
        read("struct A {\n  double x;\n};")
