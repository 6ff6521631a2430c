"""The only place that knows how to run things: demo, tests, kernels, lint, types, conformance,
smoke, matrix, support, bench, build, compile_tpu, wheel_cpu.

Knows: what each session installs and calls. Does not know: what the commands do.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from platform import machine as host_machine

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "kernels"]

ROOT = Path(__file__).parent
TREE = ("-e", ".", "-e", "backends/cpu")
TESTED_TREE = ("-e", ".[test]", "-e", "backends/cpu", "-e", "conformance")
DISTRIBUTIONS = (".", "backends/cpu", "backends/tpu", "conformance")
JUDGED = {
    "reference": (),
    "cpu": ("-e", "backends/cpu", "torch"),
    "jax": ("jax",),
    "tpu": ("-e", "backends/tpu"),
}
"""Backend -> what it needs beside the core and the suite."""
MATRIX = ROOT / ".github" / "conformance.json"
"""Every backend that the support matrix names, whether or not there is a runner for it."""
REPORTS = ROOT / "build" / "reports"
FETCH_DEMO_MODEL = (
    "from vllm_core.weights.demo import ensure_demo_model; print(ensure_demo_model(print))"
)
COMPARISON = ("peers", "agreement", "plot")
"""Scripts of the CPU backend's bench."""
SHOW_KERNELS = "from vllm_core_cpu import native; print(native.find()); native.find().linear"


def install(session: nox.Session, *what: str) -> None:
    """Always with the constraints: they pin torch, of which an unpinned one is gigabytes larger."""
    session.install("-c", "constraints.txt", *what)


@nox.session
def demo(session: nox.Session) -> None:
    """From nothing to an answer on a bare CPU machine; a terminal stays in the chat."""
    install(session, *TREE, "torch")
    session.run("vllm-core", "doctor")
    session.run("python", "-c", FETCH_DEMO_MODEL)
    prompt = session.posargs or ["--prompt", "What is the capital of France?", "--interactive"]
    session.run("vllm-core", "chat", "--temperature", "0", "--dtype", "float32", *prompt)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that can be tested without an accelerator; takes pytest's arguments."""
    install(session, *TESTED_TREE, "torch", "jax")
    # without the demo model its tests skip, and say so
    session.run("python", "-c", FETCH_DEMO_MODEL, success_codes=[0, 1])
    environment = {"OMP_NUM_THREADS": "1"}  # two workers, two cores: more threads only fight
    session.run("pytest", "-n", "2", *session.posargs, env=environment)


@nox.session
def kernels(session: nox.Session) -> None:
    """The CPU backend's kernels on every instruction set of this machine (old x86 and Arm under
    qemu where it is: apt-get install g++-aarch64-linux-gnu qemu-user-static), the TPU's in jax's
    interpreter."""
    install(session, *TESTED_TREE, "-e", "backends/tpu", "torch")
    environment = {"OMP_NUM_THREADS": "1"}
    what = session.posargs or ["backends/cpu/tests", "backends/tpu/tests"]
    session.run("pytest", "-n", "2", "-r", "s", *what, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and who may import whom."""
    install(session, "ruff", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    path = ":".join(
        str(ROOT / place) for place in (".", "backends/cpu", "backends/tpu", "conformance")
    )
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": path})


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, on everything."""
    install(session, *TESTED_TREE, "torch", "jax", "mypy", "nox", "hatchling")
    session.run("mypy", *session.posargs)


@nox.session
@nox.parametrize("backend", list(JUDGED))
def conformance(session: nox.Session, backend: str) -> None:
    """`nox -s "conformance(backend='cpu')" -- core,serving`: report.json in build/reports/cpu.

    The profiles are the first argument (default: core); the others go to `vllm-core conformance
    run`.
    """
    profile, *more = session.posargs or ["core"]
    install(session, "-e", ".", "-e", "conformance", *JUDGED[backend])
    what = ("--backend", backend, "--profile", profile, "--output", str(REPORTS / backend))
    session.run("vllm-core", "conformance", "run", *what, *more)


@nox.session
def smoke(session: nox.Session) -> None:
    """The sharpest probes on every backend that runs without an accelerator, in one environment."""
    install(session, "-e", ".", "-e", "conformance", *(x for need in JUDGED.values() for x in need))
    for backend in JUDGED:
        what = ("--backend", backend, "--profile", "smoke", "--jobs", "2")
        output = ("--output", str(REPORTS / f"smoke-{backend}"))
        # compiling each program in three dtypes would take minutes
        dtype = ("--dtype", "float32") if backend in ("jax", "tpu") else ()
        session.run("vllm-core", "conformance", "run", *what, *output, *dtype, *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Every planted fault against every case: `nox -s matrix -- --quick`."""
    install(session, "-e", ".", "-e", "conformance", "torch", "jax")
    session.run("vllm-core", "conformance", "matrix", *session.posargs)


@nox.session
def support(session: nox.Session) -> None:
    """docs/support.md from every report.json below a folder (default: build/reports)."""
    install(session, "-e", ".", "-e", "conformance")
    below = Path(session.posargs[0]) if session.posargs else REPORTS
    reports = sorted(str(path) for path in below.rglob("report.json"))
    if not reports:
        session.error(f"no report.json below {below}; first: nox -s conformance")
    named = ",".join(row["backend"] for row in json.loads(MATRIX.read_text()))
    what = ("--support-matrix", "--unverified", named, "--output", "docs/support.md")
    session.run("vllm-core", "conformance", "report", *reports, *what)


@nox.session
def bench(session: nox.Session) -> None:
    """`nox -s bench -- throughput --num-prompts 32`: the arguments go to `vllm-core bench`; after
    `peers`, `agreement` or `plot` to the script of the comparison with other engines."""
    install(session, *TREE, "torch")
    if session.posargs and session.posargs[0] in COMPARISON:
        script, *more = session.posargs
        session.run("python", f"backends/cpu/bench/{script}.py", *more)
        return
    session.run("vllm-core", "bench", *(session.posargs or ["--help"]))


@nox.session
def build(session: nox.Session) -> None:
    """Every wheel, into dist/."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", *DISTRIBUTIONS)
    for wheel in sorted((ROOT / "dist").glob("*.whl")):
        session.log(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1024:.0f} KiB")


@nox.session
def compile_tpu(session: nox.Session) -> None:
    """The TPU backend's kernels and whole steps by the real compiler, without a TPU, against the
    budgets: `-- --quick` for two kernels per chip, `-- --update-budgets` to allow what is now."""
    install(session, "-e", ".", "-e", "backends/tpu[device]")
    output = ("--output", str(ROOT / "build" / "compile_tpu"))
    session.run("python", "-m", "vllm_core_tpu.compile", *output, *session.posargs)


@nox.session
def wheel_cpu(session: nox.Session) -> None:
    """The CPU backend's wheel for any Linux with glibc 2.28 (2018), into dist/: without Docker, by
    a compiler that brings old system libraries. `-- aarch64` for Arm."""
    (machine,) = session.posargs or ["x86_64"]
    session.install("wheel==0.48.0", "ziglang==0.17.0")
    place = ROOT / "build" / "wheel_cpu"
    shutil.rmtree(place, ignore_errors=True)
    # -I: pip hides this environment from what it builds
    zig = f"{session.virtualenv.bin}/python -I -m ziglang c++ -target {machine}-linux-gnu.2.28"
    environment = {"CXX": zig, "LDFLAGS": "-s"}
    where = ("--no-deps", "--wheel-dir", str(place), "backends/cpu")
    session.run("python", "-m", "pip", "wheel", *where, env=environment)
    (built,) = place.glob("*.whl")
    mistake = mistake_in_wheel(built, machine)
    if mistake:
        session.error(f"{built.relative_to(ROOT)}: {mistake}")
    tag = ("--remove", "--platform-tag", f"manylinux_2_28_{machine}")
    session.run("python", "-m", "wheel", "tags", *tag, str(built))
    (wheel,) = place.glob("*.whl")
    (ROOT / "dist").mkdir(exist_ok=True)
    wheel = wheel.replace(ROOT / "dist" / wheel.name)
    session.log(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1024:.0f} KiB")
    if machine == host_machine():
        install(session, ".")
        session.install("--no-deps", "--force-reinstall", str(wheel))
        session.run("python", "-c", SHOW_KERNELS)


def mistake_in_wheel(wheel: Path, machine: str) -> str:
    """What keeps a wheel of the CPU backend from being a manylinux_2_28 one; else ""."""
    if not wheel.name.endswith(f"-py3-none-linux_{machine}.whl"):
        return "it has no kernels; `pip wheel -v` shows what the build said"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("vllm_core_cpu/_kernels.so")
    if any("csrc" in name for name in names):
        return f"it has sources: {names}"
    newest = max(map(int, re.findall(rb"\0GLIBC_2\.(\d+)", library)))
    if newest > 28:
        return f"it needs glibc 2.{newest}"
    system = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    needed = {name.decode() for name in re.findall(rb"\0(lib[\w+-]+\.so\.\d+)\0", library)}
    return f"it needs {needed - system}" if needed - system else ""
