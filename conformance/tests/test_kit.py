"""The vendor kit: what it writes is a backend that the suite accepts."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from vllm_core.errors import InvalidArgument
from vllm_core_conformance.case import Case
from vllm_core_conformance.cases import select
from vllm_core_conformance.kit import cli
from vllm_core_conformance.kit.distribution import (
    FRAMEWORKS,
    MAX_NAME,
    check_name,
    count_lines,
    render,
    write,
)
from vllm_core_conformance.outcome import execute
from vllm_core_conformance.sources import resolve
from vllm_core_conformance.target import Target

ROOT = Path(__file__).parents[2]
NEEDS = {"torch": "torch", "jax": "jax", "none": "numpy"}


@dataclass(frozen=True)
class Generated:
    """A backend on disk, visible to discovery as an installed one is."""

    name: str
    framework: str
    folder: Path

    @property
    def package(self) -> str:
        return f"vllm_core_{self.name}"

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


@pytest.fixture(scope="module", params=sorted(FRAMEWORKS))
def generated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Generated]:
    """Not installed by pip, but found: what pip would write for discovery lies beside it."""
    framework: str = request.param
    pytest.importorskip(NEEDS[framework], reason=f"the kit for {framework} was not checked")
    name = f"kit{framework}"
    folder = tmp_path_factory.mktemp(framework) / "distribution"
    write(render(name, framework), folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    facts = folder / f"vllm_core_{name}-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 0.1.0\n"
    )
    ((group, points),) = project["project"]["entry-points"].items()
    lines = [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder), *(path for path in sys.path if path)]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))  # for processes that a test starts
        patch.syspath_prepend(str(folder))
        yield Generated(name, framework, folder)


def few_cases(is_static: bool) -> list[Case]:
    """The contract's and some of `core`; without those that compile for seconds."""
    contract = [case for case in select(["contract"]) if case.area != "memory"]
    if is_static:
        contract = [case for case in contract if case.area == "contract"]
    ops = [case for case in select(["smoke"]) if case.area == "ops" and "core" in case.profiles]
    return contract + ops[:4]


def test_a_generated_backend_is_found_and_accepted(generated: Generated) -> None:
    target = Target(resolve(generated.name), "float32")
    try:
        cases = few_cases(target.is_static)
        assert len(cases) > 10
        results = [execute(case, target, seed=7) for case in cases]
    finally:
        target.close()
    assert {r.case: r.sentence for r in results if r.status != "pass"} == {}


def test_its_provider_table_names_the_op_that_is_its_own(
    generated: Generated, capsys: pytest.CaptureFixture[str]
) -> None:
    generated.module("providers").main()
    *rows, last = capsys.readouterr().out.splitlines()
    own = {row.split()[0] for row in rows if row.split()[1] == "own"}
    assert ("linear" if generated.framework == "none" else "silu_and_mul") in own
    assert last == f"{len(own)} of {len(rows)} are {generated.name}'s own"


def test_its_own_test_file_has_three_lines_of_code_and_collects(generated: Generated) -> None:
    text = (generated.folder / "tests" / "test_conformance.py").read_text()
    assert len(text.splitlines()) == 3
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        + ["-p", "vllm_core_conformance.pytest_plugin", str(generated.folder / "tests")],
        cwd=generated.folder,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    first = select(["contract"])[0].id
    assert f"test_conformance[{first}-" in run.stdout


def test_a_vendor_owns_less_than_300_lines_before_a_kernel(generated: Generated) -> None:
    own, kernels = count_lines(render(generated.name, generated.framework))
    assert own < 300
    assert (kernels > 0) == (generated.framework == "none")


def test_it_imports_no_framework_to_be_listed(generated: Generated) -> None:
    code = f"import sys, {generated.package}.plugin as p; p.probe(); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not {"torch", "jax"} & set(run.stdout.split())


@pytest.mark.parametrize("name", ["x", "acme", "a" * MAX_NAME])
@pytest.mark.parametrize("framework", sorted(FRAMEWORKS))
def test_code_is_clean_whatever_the_name(name: str, framework: str, tmp_path: Path) -> None:
    files = render(name, framework)
    for path, text in files.items():
        assert "<<" not in text and "<%" not in text, path
        if path.endswith(".py"):
            compile(text, path, "exec")
            assert max(map(len, text.splitlines())) <= 100, path
    if shutil.which("ruff") is not None:
        write(files, tmp_path / "new")
        for command in (["check"], ["format", "--check"]):
            run = subprocess.run(
                ["ruff", *command, "--no-cache", "."],
                cwd=tmp_path / "new",
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    "name",
    ["", "Acme", "1st", "a-b", "a__b", "a_", "class", "a" * (MAX_NAME + 1), "../x"]
    + ["reference", "jax", "null", "conformance"],
)
def test_a_name_that_cannot_be_or_is_taken_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_name(name)


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


def test_the_command_lists_what_it_wrote_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    assert call("acme", "--framework", "torch", "--output", str(folder)) == 0
    out = capsys.readouterr().out
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 8 and all(str(path) in out for path in written)
    assert "vllm-core conformance run --backend acme --profile contract,core" in out


def test_a_folder_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="exists already"):
        call("acme", "--framework", "none", "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_extras_of_the_core_are_kept_for_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reserved = set(extras["optional-dependencies"]) - {"test", "cpu"}
    assert reserved
    for name in reserved:
        with pytest.raises(InvalidArgument, match="taken"):
            check_name(name)
