"""The same cases as pytest items; and no trace of them where nobody asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
VENDOR = """\
from vllm_core_conformance.pytest_plugin import conformance_tests

test_conformance = conformance_tests("fakes:{backend}", profile="core", suite="fakes")
"""


def pytest_run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a pytest of its own in `folder`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    plugin = ("-p", "vllm_core_conformance.pytest_plugin") if not _is_installed() else ()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-v", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def _is_installed() -> bool:
    from importlib.metadata import entry_points

    return any(e.name == "vllm_core_conformance" for e in entry_points(group="pytest11"))


def vendor_file(folder: Path, backend: str) -> Path:
    (folder / "test_vendor.py").write_text(VENDOR.format(backend=backend))
    return folder


def test_three_lines_are_one_test_per_case_and_dtype(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, said = pytest_run(
        vendor_file(tmp_path, "right"), f"--conformance-report={report}", "test_vendor.py"
    )
    assert code == 0, said
    assert "test_vendor.py::test_conformance[fake.first-bfloat16] PASSED" in said
    assert "5 passed" in said
    assert json.loads(report.read_text())["verdict"]["status"] == "passed"


def test_a_crash_is_a_failed_test_and_not_the_end_of_pytest(tmp_path: Path) -> None:
    code, said = pytest_run(vendor_file(tmp_path, "aborts"), "test_vendor.py")
    assert code == 1
    assert "1 failed, 4 passed" in said
    assert "SIGABRT" in said
    assert "vllm-core conformance repro fake.second" in said


def test_a_backend_that_cannot_be_opened_fails_every_item(tmp_path: Path) -> None:
    code, said = pytest_run(vendor_file(tmp_path, "open_aborts"), "test_vendor.py")
    assert code == 1
    assert "passed" not in said.splitlines()[-1].replace("1 passed", "")  # the unscored one


def test_a_crash_while_closing_fails_the_session(tmp_path: Path) -> None:
    code, said = pytest_run(vendor_file(tmp_path, "close_aborts"), "test_vendor.py")
    assert code == 1
    assert "conformance: closing the backend" in said


def test_what_was_deselected_is_missing_in_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    folder = vendor_file(tmp_path, "right")
    pytest_run(folder, f"--conformance-report={report}", "-k", "first", "test_vendor.py")
    assert json.loads(report.read_text())["verdict"]["status"] == "failed"


def test_no_case_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test_vendor.py").write_text(
        VENDOR.format(backend="right").replace('"core"', '"serving"')
    )
    code, said = pytest_run(tmp_path, "test_vendor.py")
    assert code not in (0, 5)
    assert "no case of profile serving" in said


def test_pyargs_without_a_backend_says_what_to_do(tmp_path: Path) -> None:
    code, said = pytest_run(tmp_path, "--pyargs", "vllm_core_conformance")
    assert code == 1
    assert "--backend=NAME" in said


def test_pyargs_collects_the_items_of_the_suite_only(tmp_path: Path) -> None:
    arguments = ("--pyargs", "vllm_core_conformance", "--backend=reference", "--profile=smoke")
    code, said = pytest_run(tmp_path, *arguments, "--collect-only", "-q", "-q")
    assert code == 0, said
    items = [line for line in said.splitlines() if "::" in line]
    assert items
    assert all("test_conformance.py::test_conformance[" in line for line in items)


def test_a_project_with_options_of_the_same_names_is_not_disturbed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        "    parser.addoption('--backend', default='their own')\n"
        "    parser.addoption('--profile', action='store_true')\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n"
        "def test_theirs(pytestconfig):\n"
        "    assert pytestconfig.getoption('--backend') == 'their own'\n"
        "    heavy = ('numpy', 'ml_dtypes', 'vllm_core_conformance.supervisor')\n"
        "    assert not [name for name in heavy if name in sys.modules]\n"
    )
    code, said = pytest_run(tmp_path, "test_theirs.py")
    assert code == 0, said
