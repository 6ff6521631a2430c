"""The only place that knows how to run things: demo, tests, lint, types, bench, build.

Knows: what each session installs and calls. Does not know: what the commands do.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
TREE = ("-e", ".", "-e", "backends/cpu")
TESTED_TREE = ("-e", ".[test]", "-e", "backends/cpu")
DISTRIBUTIONS = (".", "backends/cpu")
FETCH_DEMO_MODEL = (
    "from vllm_core.weights.demo import ensure_demo_model; print(ensure_demo_model(print))"
)


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
    session.run("vllm-core", "chat", "--temperature", "0", *prompt)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that can be tested without an accelerator; takes pytest's arguments."""
    install(session, *TESTED_TREE, "torch", "jax")
    # without the demo model its tests skip, and say so
    session.run("python", "-c", FETCH_DEMO_MODEL, success_codes=[0, 1])
    environment = {"OMP_NUM_THREADS": "1"}  # two workers, two cores: more threads only fight
    session.run("pytest", "-n", "2", *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and who may import whom."""
    install(session, "ruff", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": f"{ROOT}:{ROOT / 'backends/cpu'}"})


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, on everything."""
    install(session, *TESTED_TREE, "torch", "jax", "mypy", "nox")
    session.run("mypy", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """`nox -s bench -- throughput --num-prompts 32`: the arguments go to `vllm-core bench`."""
    install(session, *TREE, "torch")
    session.run("vllm-core", "bench", *(session.posargs or ["--help"]))


@nox.session
def build(session: nox.Session) -> None:
    """Every wheel, into dist/."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", *DISTRIBUTIONS)
    for wheel in sorted((ROOT / "dist").glob("*.whl")):
        session.log(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1024:.0f} KiB")
