"""`vllm-core conformance` as a user runs it: verdicts, exit codes, reports on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_core_conformance.cli import main

HERE = Path(__file__).parent
FAKES = ("--suite", "fakes")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def run(backend: str, *more: str) -> int:
    return main(["run", "--backend", f"fakes:{backend}", *FAKES, *more])


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_a_right_backend_passes_and_every_form_of_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("right", "--output", str(tmp_path / "out")) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "report.md", "report.html", "badge.svg"}
    report = report_of(tmp_path / "out")
    assert report["verdict"]["status"] == "passed"
    assert report["counts"]["pass"] == 3
    assert report["counts"]["not_supported"] == 1
    said = capsys.readouterr().out
    assert "core-A" in said
    assert "passed" in said


def test_a_failure_is_named_with_its_sentence_and_the_command_that_repeats_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("zeros") == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("fake.second"))
    assert lines[at] == "fake.second (float32, seed 0): fail"
    assert lines[at + 1].strip() == "second returned 0.0, expected 1.0"
    assert any(line.startswith("vllm-core conformance repro fake.second") for line in lines)


@pytest.mark.parametrize("backend", ["aborts", "exits", "leaves", "sleeps", "garbage", "refuses"])
def test_nothing_but_right_answers_passes(backend: str, tmp_path: Path) -> None:
    assert run(backend, "--output", str(tmp_path)) == 1
    assert report_of(tmp_path)["verdict"]["status"] == "failed"


@pytest.mark.parametrize("backend", ["open_raises", "open_aborts", "close_aborts"])
def test_a_backend_that_cannot_open_or_close_does_not_pass(backend: str) -> None:
    assert run(backend) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--backend", "no-such-backend"],
        ["run", "--backend", "no_such_module:open", "--suite", "fakes"],
        ["run", "--backend", "fakes:right", "--suite", "fakes", "--profile", "everything"],
        ["run", "--backend", "fakes:right", "--suite", "fakes", "--case", "nothing.*"],
        ["run", "--backend", "fakes:right", "--suite", "fakes", "--dtype", "float8"],
        ["run", "--backend", "fakes:right", "--suite", "fakes", "--profile", "serving"],
        ["repro", "no.such.case", "--backend", "fakes:right", "--suite", "fakes"],
        ["report", "no-such-file"],
    ],
)
def test_what_does_not_exist_is_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_backend_without_its_device_is_unverified_and_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absent_plugin.py").write_text(
        "from vllm_core.backend import BackendInfo, Probe\n"
        "from vllm_core.backend.hookspecs import hookimpl\n"
        "def probe(): return Probe([], reason='no card in this machine')\n"
        "@hookimpl\n"
        "def vllm_core_backends():\n"
        "    return [BackendInfo(name='absent', api='>=0.1,<0.2', summary='', priority=1,\n"
        "                        probe='absent_plugin:probe', open='absent_plugin:open')]\n"
    )
    facts = tmp_path / "vllm_core_absent-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-core-absent\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[vllm_core]\nabsent = absent_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    assert main(["run", "--backend", "absent", *FAKES, "--output", str(out)]) == 3
    report = report_of(out)
    assert report["verdict"]["status"] == "unverified"
    assert {r["status"] for r in report["results"]} == {"unverified"}
    assert "no card in this machine" in report["results"][0]["sentence"]


def test_a_part_of_a_profile_earns_no_badge(tmp_path: Path) -> None:
    assert run("right", "--case", "fake.f*", "--output", str(tmp_path)) == 0
    assert "partial" in (tmp_path / "badge.svg").read_text()


def test_fail_fast_ends_at_the_first_failure(tmp_path: Path) -> None:
    assert run("zeros", "--fail-fast", "--output", str(tmp_path)) == 1
    report = report_of(tmp_path)
    assert report["verdict"]["status"] == "incomplete"
    assert len(report["results"]) < len(report["expected"])


def test_several_seeds_are_several_results(tmp_path: Path) -> None:
    assert run("right", "--seed", "5", "--repeat", "2", "--output", str(tmp_path)) == 0
    assert {r["seed"] for r in report_of(tmp_path)["results"]} == {5, 6}


def test_json_is_all_that_stands_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("zeros", "--json") == 1
    assert json.loads(capsys.readouterr().out)["counts"]["fail"] == 1


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *FAKES]) == 0
    said = capsys.readouterr().out
    assert "fake.third  [core]" in said
    assert "may be refused without batch_invariant" in said
    assert "4 cases, 3 of them scored" in said


def test_repro_says_everything_and_writes_a_script_that_does_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "again.py"
    arguments = ["repro", "fake.second", "--backend", "fakes:zeros", *FAKES, "--seed", "7"]
    assert main([*arguments, "--write-script", str(script)]) == 1
    said = capsys.readouterr().out
    assert "fake.second (float32, seed 7): fail" in said
    assert "second returned 0.0, expected 1.0" in said
    assert "got: 0.0" in said
    text = script.read_text()
    assert len(text.splitlines()) <= 40
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=HERE
    )
    assert done.returncode == 1, done.stderr
    assert "wrong: second returned 0.0, expected 1.0" in done.stdout


def test_ctrl_c_ends_at_once_and_leaves_a_report_that_says_so(tmp_path: Path) -> None:
    arguments = ["run", "--backend", "fakes:always_sleeps", *FAKES, "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_core_conformance.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert "results to come" in process.stdout.readline()
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - begin < 5
    report = report_of(tmp_path)
    assert report["verdict"]["status"] == "incomplete"
    assert "Ctrl-C" in report["interrupted"]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ("numpy", "rich", "torch", "jax", "pytest", "jinja2", "ml_dtypes")
    script = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('imported', [n for n in {heavy} if n in sys.modules]))\n"
        "from vllm_core_conformance.cli import main\n"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "imported []" in done.stdout
