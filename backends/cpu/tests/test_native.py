"""Python's view of the kernels: the same structs, the right instruction set, clear refusals."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.toolchain import run
from vllm_core.errors import InvalidArgument
from vllm_core.ops import Column
from vllm_core_cpu import native, plugin


@pytest.fixture(autouse=True)
def built(library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VLLM_CORE_CPU_ISA", raising=False)
    return library


@pytest.fixture
def kernels() -> native.Native:
    found, why_not = native.load()
    assert found is not None, why_not
    return found


def header() -> str:
    return (native.SOURCES / "kernels.h").read_text()


def test_structs_and_signatures_are_those_of_the_header(hatch_build: ModuleType) -> None:
    theirs = hatch_build.read_interface(header())
    ours = {
        struct.__name__: [
            (name, native.SIGNATURES.get(name) if struct is native.Kernels else native.KINDS[kind])
            for name, kind, *_ in struct._fields_
        ]
        for struct in (*native.STRUCTS, native.Kernels)
    }
    ours["Kernels"][0] = ("name", "p")
    assert ours == theirs


def test_sizes_and_offsets_are_those_that_the_compiler_chose(library: Path) -> None:
    compiled = ctypes.CDLL(str(library))
    compiled.vc_layout.restype = ctypes.POINTER(native._Row)
    layout = native.compiled_layout(compiled)
    assert layout == native.own_layout()
    assert layout["Linear"] == ("s", 0, ctypes.sizeof(native.Linear))
    assert layout["Linear.k"] == ("l", 40, 8)


def test_constants_are_those_of_the_sources() -> None:
    (values,) = re.findall(r"enum Dtype : int32_t \{(.*?)\};", header())
    for name, value in re.findall(r"(\w+) = (\d+)", values):
        assert int(value) == getattr(native, name)
    (panel,) = re.findall(r"PANEL = (\d+);", (native.SOURCES / "linear.h").read_text())
    assert int(panel) == native.PANEL
    (columns,) = re.findall(r"enum Column : int32_t \{(.*?)\};", header(), re.DOTALL)
    for name, value in re.findall(r"(\w+) = (\d+)", columns):
        assert int(value) == Column[name]


def test_the_best_instruction_set_is_taken_and_any_usable_one_can_be_named(
    kernels: native.Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.isa == kernels.usable[0]
    assert kernels.usable[-1] == "generic"
    for isa in kernels.usable:
        monkeypatch.setenv("VLLM_CORE_CPU_ISA", isa)
        found, _ = native.load()
        assert found is not None
        assert found.isa == isa


@pytest.mark.parametrize("name", ["avx3", "neon_bf16" if sys.platform == "linux" else "x"])
def test_an_instruction_set_that_cannot_be_had_is_refused_with_those_that_can(
    kernels: native.Native, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name in kernels.usable:
        pytest.skip(f"NOT CHECKED: that {name} is refused, since this processor has it")
    monkeypatch.setenv("VLLM_CORE_CPU_ISA", name)
    usable = re.escape(", ".join(kernels.usable))
    with pytest.raises(InvalidArgument, match=f"VLLM_CORE_CPU_ISA={name}: .*{usable}, portable"):
        native.load()
    assert plugin.probe().devices
    assert name in plugin.probe().reason
    assert plugin.probe().fix == "unset VLLM_CORE_CPU_ISA"


def test_portable_means_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CORE_CPU_ISA", "portable")
    assert native.load() == (None, "VLLM_CORE_CPU_ISA=portable; unset VLLM_CORE_CPU_ISA")
    assert "portable ops" in plugin.probe().reason


def test_a_library_that_was_not_built_is_told_with_the_reason_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "why.txt").write_text("there is no C++ compiler\n")
    monkeypatch.setattr(native, "WHY_PURE", tmp_path / "why.txt")
    found = native.find(tmp_path / "_kernels.so")
    assert isinstance(found, native.Absent)
    assert found.reason == "our kernels were not built (there is no C++ compiler)"
    assert "hatch_build.py" in found.fix
    monkeypatch.setattr(native, "SOURCES", tmp_path / "none")  # as installed from a wheel
    assert "pip install" in native.how_to_build()
    monkeypatch.setenv("VLLM_CORE_CPU_ISA", "generic")
    with pytest.raises(InvalidArgument, match="were not built"):
        native.find(tmp_path / "_kernels.so")


def test_a_library_for_another_machine_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"\x7fELF" + bytes(60))
    found = native.find(broken)
    assert isinstance(found, native.Absent)
    assert "cannot be loaded here" in found.reason


def test_a_library_of_other_sources_is_not_used(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Linear(ctypes.Structure):
        _fields_ = native.Linear._fields_[1:]

    shutil.copy(library, tmp_path / "_kernels.so")
    monkeypatch.setattr(native, "STRUCTS", (Linear, *native.STRUCTS[1:]))
    found = native.find(tmp_path / "_kernels.so")
    assert isinstance(found, native.Absent)
    assert "built from other sources" in found.reason


def test_the_probe_names_the_kernels_and_imports_no_framework() -> None:
    script = (
        "import sys; from vllm_core_cpu import plugin; found = plugin.probe();"
        "print(found.reason, found.fix, 'torch' in sys.modules)"
    )
    done = run(sys.executable, "-c", script, VLLM_CORE_CPU_ISA="generic")
    assert done.stdout.strip().endswith("own kernels: generic  False"), done.stdout + done.stderr


def test_the_probe_says_when_sources_are_younger(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    assert "older" not in plugin.probe().reason
    (tmp_path / "linear.h").write_text("")
    assert "older than their sources" in plugin.probe().reason
    assert "hatch_build.py" in plugin.probe().fix


@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_on_threads_is_torchs_own(kernels: native.Native, threads: int) -> None:
    m, n, k = 5, 130, 71
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    kernels.set_threads(threads)
    try:
        x, weight, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        packed = torch.empty(kernels.packed_bytes(native.FLOAT32, n, k), dtype=torch.uint8)
        kernels.pack(native.FLOAT32, weight.data_ptr(), k, n, k, packed.data_ptr())
        record = native.Linear(packed=packed.data_ptr(), n=n, k=k, out_stride=n)
        kernels.linear(ctypes.addressof(record), x.data_ptr(), k, out.data_ptr(), m)
        torch.testing.assert_close(out, x @ weight.T, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)
        kernels.set_threads(1)
