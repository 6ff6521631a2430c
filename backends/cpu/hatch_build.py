"""Compiles the CPU kernels into vllm_core_cpu/_kernels.so: hatchling's build hook, and a script.

    python backends/cpu/hatch_build.py                      in place, when something changed
    python backends/cpu/hatch_build.py --only avx2          one instruction set beside `generic`
    CXX=aarch64-linux-gnu-g++ python backends/cpu/hatch_build.py --output /tmp/_kernels.so

The library has a C interface and needs no header of Python or torch: a C++ compiler is enough, and
one library serves every version of both. CXX, CXXFLAGS and LDFLAGS are honoured. Without a
compiler the wheel is pure, and a file in it says why, for `vllm-core doctor`.

Knows: compilers, instruction sets, flags, wheels. Does not know: what kernels compute, ctypes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent / "vllm_core_cpu"
SOURCES = PACKAGE / "csrc"
LIBRARY = PACKAGE / "_kernels.so"
WHY_PURE = PACKAGE / "_kernels_missing.txt"
"""Written where a build leaves no library: the reason, in one line."""

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
INSTRUCTION_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "generic": (),
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": (*AVX512, "-mavx512bf16"),
    },
    "aarch64": {"generic": (), "neon_bf16": ("-march=armv8.2-a+bf16+dotprod+i8mm",)},
}
"""Machine -> name -> flags. Each contains the one before it, and they are linked in this order: of
a function that several objects define alike (an inline one of a system header), the linker keeps
the first, which every processor that gets there can run."""
SPELLINGS = {"-march=armv8.2-a+bf16+dotprod+i8mm": "-mcpu=generic+bf16+dotprod+i8mm"}
"""For a compiler that does not know the first (zig); gcc takes the second and means less by it."""

COMPILE = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-fno-exceptions", "-fno-rtti", "-ffunction-sections"),
)
"""After CXXFLAGS: with the -O2 that some distributions set, tiles of registers go to memory."""
LINK = (
    *("-shared", "-pthread", "-static-libstdc++", "-static-libgcc"),
    *("-Wl,--no-undefined", "-Wl,--gc-sections"),
)
EXPORTS = "{ global: vc_*; local: *; };\n"


class BuildError(Exception):
    """No library; the text says why."""


class Compiler(NamedTuple):
    command: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    machine: str  # that it compiles for
    version: str


class Built(NamedTuple):
    instruction_sets: Sequence[str]
    left_out: Sequence[str]  # the compiler does not know them
    seconds: float  # 0: was up to date


# ---- the compiler


def find_compiler() -> Compiler:
    """The one that CXX names, else c++, g++ or clang++; BuildError where there is none."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the kernels are built on Linux only, not on {sys.platform}")
    given = os.environ.get("CXX")  # noqa: TID251 - nothing else of the project is here when we build
    if given:
        command = tuple(shlex.split(given))
    else:
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if found is None:
            raise BuildError("there is no C++ compiler: CXX is not set, no c++, g++ or clang++")
        command = (found,)
    try:
        done = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} does not work: {_tail(done.stderr)}")
    macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
    machine = next((name for name in INSTRUCTION_SETS if f"__{name}__" in macros), None)
    if machine is None or "__linux__" not in macros:
        known = ", ".join(INSTRUCTION_SETS)
        raise BuildError(f"{shlex.join(command)} compiles neither for Linux on {known}")
    version = macros.get("__VERSION__", "").strip('"')
    return Compiler(command, _flags("CXXFLAGS"), _flags("LDFLAGS"), machine, version)


def _flags(name: str) -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get(name, "")))  # noqa: TID251


def _knows(compiler: Compiler, flags: Sequence[str]) -> bool:
    empty = ("-fsyntax-only", "-x", "c++", os.devnull)
    return _run([*compiler.command, *compiler.flags, *COMPILE, *flags, *empty]).returncode == 0


# ---- the interface, read from kernels.h


def read_interface(header: str) -> dict[str, list[tuple[str, str]]]:
    """Struct -> (field, kind): p pointer, i int32, l int64, f float; functions as l(ppi)."""
    text = re.sub(r"//[^\n]*", "", header)
    found: dict[str, list[tuple[str, str]]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        found[name] = fields = []
        for line in (part.strip() for part in body.split(";")):
            function = re.fullmatch(r"(.+?)\(\*(\w+)\)\((.*)\)", line, re.DOTALL)
            if function:
                result, field, arguments = function.groups()
                kinds = "".join(_kind(argument) for argument in arguments.split(","))
                fields.append((field, f"{_kind(result)}({kinds})"))
            elif line:
                declaration = re.fullmatch(r"(.*?[\s*])(\w+(?:\s*,\s*\w+)*)", line, re.DOTALL)
                if declaration is None:
                    raise BuildError(f"kernels.h: struct {name}: cannot read {line!r}")
                kind = _kind(declaration[1])
                fields += [(field.strip(), kind) for field in declaration[2].split(",")]
    return found


def _kind(declaration: str) -> str:
    if "*" in declaration:
        return "p"
    kinds = {"int32_t": "i", "int64_t": "l", "float": "f", "void": "v"}
    words = [word for word in declaration.split() if word in kinds]
    if len(words) != 1:
        raise BuildError(f"kernels.h: {declaration.strip()!r} is none of {', '.join(kinds)}, *")
    return kinds[words[0]]


def layout_table(interface: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """What dispatch.cpp includes: a row for each struct and each field."""
    rows = []
    for struct, fields in interface.items():
        rows.append(f"VC_SIZE({struct})")
        rows += [f'VC_FIELD({struct}, {field}, "{kind}")' for field, kind in fields]
    return "\n".join(rows) + "\n"


# ---- the library


def build(output: Path, compiler: Compiler, only: str | None = None, force: bool = False) -> Built:
    """Compiles and links into `output`, unless it was built from just this; atomically."""
    key = _key(compiler, only)
    if not force and output.exists() and key.encode() in output.read_bytes():
        os.utime(output)  # newer than its sources, which some tool has touched
        return Built((), (), 0.0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vllm-core-cpu-") as folder:
        place = Path(folder)
        built, left_out = _compile(place, compiler, only, key)
        objects = [str(place / f"{name}.o") for name in ("dispatch", *built)]
        (place / "exports").write_text(EXPORTS)
        result = place / LIBRARY.name
        arguments = [*LINK, f"-Wl,--version-script={place / 'exports'}", "-o", str(result)]
        done = _run(
            [*compiler.command, *compiler.flags, *objects, *arguments, *compiler.link_flags]
        )
        if done.returncode:
            raise BuildError(f"linking failed: {_tail(done.stderr)}")
        beside = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copy(result, beside)
        beside.replace(output)  # who has the old one loaded keeps it
    return Built(built, left_out, time.monotonic() - start)


def build_in_place(only: str | None = None, force: bool = False) -> Built:
    """Into the package; where that fails the old library stays. One process at a time."""
    compiler = find_compiler()
    lock = os.open(SOURCES, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = build(LIBRARY, compiler, only, force)
    finally:
        os.close(lock)
    WHY_PURE.unlink(missing_ok=True)
    return built


def _compile(
    place: Path, compiler: Compiler, only: str | None, key: str
) -> tuple[list[str], list[str]]:
    """Objects in `place`; (instruction sets built, those that the compiler does not know)."""
    wanted = dict(INSTRUCTION_SETS[compiler.machine])
    if only is not None and only not in wanted:
        names = ", ".join(wanted)
        raise BuildError(f"there is no instruction set {only} on {compiler.machine}, only {names}")
    if only is not None:
        wanted = {name: flags for name, flags in wanted.items() if name in ("generic", only)}
    for flag, other in SPELLINGS.items():
        if any(flag in flags for flags in wanted.values()) and not _knows(compiler, [flag]):
            wanted = {
                name: tuple(other if x == flag else x for x in flags)
                for name, flags in wanted.items()
            }
    header = (SOURCES / "kernels.h").read_text()
    (place / "layout.inc").write_text(layout_table(read_interface(header)))
    command = [*compiler.command, *compiler.flags, *COMPILE, "-I", str(SOURCES), "-I", str(place)]

    def compile_one(name: str) -> subprocess.CompletedProcess[str]:
        source, own = SOURCES / "isa.cpp", [*wanted[name], f"-DVC_ISA={name}"]
        return _run([*command, *own, "-c", str(source), "-o", str(place / f"{name}.o")])

    built, left_out = [], []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = dict(zip(wanted, pool.map(compile_one, wanted)))
    for name, result in done.items():
        if result.returncode == 0:
            built.append(name)
        elif _knows(compiler, wanted[name]):
            raise BuildError(f"compiling for {name} failed:\n{_tail(result.stderr)}")
        else:
            left_out.append(name)
    has = [f"-DVC_HAS_{name}" for name in built]
    has += [f'-DVC_BUILD="{key}"', "-c", str(SOURCES / "dispatch.cpp")]
    result = _run([*command, *has, "-o", str(place / "dispatch.o")])
    if result.returncode:
        raise BuildError(f"compiling dispatch.cpp failed:\n{_tail(result.stderr)}")
    return built, left_out


def _key(compiler: Compiler, only: str | None) -> str:
    """Names everything that the library follows from; the library carries it."""
    digest = hashlib.sha256(repr((compiler, only)).encode())
    for source in (*sorted(SOURCES.glob("*.[hc]*")), Path(__file__)):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"vc-build-{digest.hexdigest()[:32]}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.strip().splitlines()[:lines])


# ---- the wheel


def get_build_hook() -> type[Any]:
    """What hatchling asks this file for."""
    from hatchling.builders.config import BuilderConfig
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class CompileKernels(BuildHookInterface[BuilderConfig]):
        """A wheel gets a library of its own; an editable install has it in place."""

        note: Path | None = None

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            try:
                self._build(version == "editable", build_data)
            except (BuildError, OSError) as error:
                self.app.display_warning(f"the CPU kernels are not built: {error}")
                self.app.display_warning(
                    "everything works, on portable ops, but slower; with a C++ compiler (g++, "
                    "clang++, or CXX=...) install again"
                )
                (why,) = str(error).splitlines()[:1]
                self._go_without(why, version == "editable", build_data)

        def _build(self, editable: bool, build_data: dict[str, Any]) -> None:
            if editable:
                self.app.display_info(summary(build_in_place()))
                return
            compiler = find_compiler()
            # pip builds a wheel twice, the first time for its metadata; each compiler its own file
            name = hashlib.sha256(repr(compiler).encode()).hexdigest()[:16]
            out = Path(self.root) / "build" / f"_kernels-{name}.so"
            out.parent.mkdir(exist_ok=True)
            self.app.display_info(summary(build(out, compiler)))
            build_data["force_include"][str(out)] = f"{PACKAGE.name}/{LIBRARY.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{compiler.machine}"

        def _go_without(self, why: str, editable: bool, build_data: dict[str, Any]) -> None:
            if editable:
                LIBRARY.unlink(missing_ok=True)
                WHY_PURE.write_text(f"{why}\n")
                return
            note = Path(tempfile.mkdtemp(prefix="vllm-core-cpu-")) / WHY_PURE.name
            note.write_text(f"{why}\n")
            build_data["force_include"][str(note)] = f"{PACKAGE.name}/{note.name}"
            self.note = note

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            if self.note is not None:
                shutil.rmtree(self.note.parent, ignore_errors=True)

    return CompileKernels


def summary(built: Built) -> str:
    if not built.seconds:
        return f"{LIBRARY.name} is up to date"
    text = f"{LIBRARY.name}: {', '.join(built.instruction_sets)} in {built.seconds:.1f} s"
    if built.left_out:
        text += f"; the compiler does not know {', '.join(built.left_out)}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds the CPU kernels in place.")
    parser.add_argument("--only", help="one instruction set beside `generic`")
    parser.add_argument("--force", action="store_true", help="even if it is up to date")
    parser.add_argument("--output", type=Path, help="another file than the package's")
    given = parser.parse_args(arguments)
    try:
        if given.output is None:
            built = build_in_place(given.only, given.force)
        else:
            built = build(given.output.absolute(), find_compiler(), given.only, given.force)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
