"""Whatever a vendor's code does is a status, and never a passed run."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vllm_core_conformance.outcome import Result
from vllm_core_conformance.process import Broken
from vllm_core_conformance.supervisor import MAX_TIMEOUTS, Settings, Supervisor, read_result
from vllm_core_conformance.tasks import Task, Wanted, plan_tasks, select_cases

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def settings(backend: str, **changes: object) -> Settings:
    known = {"backend": f"fakes:{backend}", "cases": "fakes", "open_limit": 30.0} | changes
    return Settings(**known)  # type: ignore[arg-type]


def tasks_of(supervisor: Supervisor, **wanted: object) -> list[Task]:
    fakes = importlib.import_module("fakes")
    description = supervisor.describe()
    assert description.status == "ok", description
    facts = description.facts
    known = Wanted(**wanted)  # type: ignore[arg-type]
    cases = select_cases(fakes.all_cases(), known)
    return plan_tasks(cases, known, facts["capabilities"], facts["dtype"])


def run(backend: str, **changes: object) -> tuple[dict[tuple[str, str], Result], list[str]]:
    """Results by (case, dtype), and what went wrong outside of cases."""
    with Supervisor(settings(backend, **changes)) as supervisor:
        tasks = tasks_of(supervisor)
        results = supervisor.run(tasks)
    assert [(r.case, r.dtype, r.seed) for r in results] == [task.name for task in tasks]
    return {(r.case, r.dtype): r for r in results}, supervisor.faults


def status(found: dict[tuple[str, str], Result], case: str, dtype: str = "float32") -> str:
    return found[f"fake.{case}", dtype].status


def test_a_backend_that_is_right_passes_every_case_in_every_dtype() -> None:
    found, faults = run("right")
    assert set(found) == {
        ("fake.first", "float32"),
        ("fake.first", "bfloat16"),
        ("fake.second", "float32"),
        ("fake.third", "float32"),
        ("fake.speed", "float32"),
    }
    assert status(found, "first") == status(found, "first", "bfloat16") == "pass"
    assert status(found, "third") == "not_supported"  # works although undeclared
    assert faults == []


@pytest.mark.parametrize(
    ("backend", "expected", "said"),
    [
        ("zeros", "fail", "second returned 0.0, expected 1.0"),
        ("raises", "fail", "behave second raised ValueError: a shape"),
        ("refuses", "capability_lie", "NotSupported"),
        ("aborts", "crash", "SIGABRT"),
        ("exits", "crash", "SystemExit(0)"),
        ("leaves", "crash", "exit code 0"),
        ("interrupts", "crash", "KeyboardInterrupt"),
        ("garbage", "harness_error", "hello"),
    ],
)
def test_a_fault_costs_its_own_case_and_no_other(backend: str, expected: str, said: str) -> None:
    found, _ = run(backend)
    second = found["fake.second", "float32"]
    assert second.status == expected
    assert said in second.sentence
    others = {key: r.status for key, r in found.items() if key[0] != "fake.second"}
    assert set(others.values()) <= {"pass", "not_supported"}


def test_what_is_undeclared_may_be_refused() -> None:
    found, _ = run("refuses_undeclared")
    assert status(found, "third") == "not_supported"


def test_what_the_vendor_prints_is_kept_from_the_protocol_and_shown_with_a_failure() -> None:
    found, _ = run("prints")
    assert status(found, "second") == "pass"
    with Supervisor(settings("aborts")) as supervisor:
        tasks = [task for task in tasks_of(supervisor) if task.case.id == "fake.second"]
        result = supervisor.run_one(tasks[0])
    assert "Abort" in result.details["output"]


def test_an_answer_that_the_vendor_forges_beside_the_true_one_is_no_pass() -> None:
    found, faults = run("forges")
    assert status(found, "second") == "harness_error"
    assert "twice" in found["fake.second", "float32"].sentence
    _ = faults


def test_a_case_without_an_answer_is_a_timeout_that_says_where_it_hangs() -> None:
    found, _ = run("sleeps")
    second = found["fake.second", "float32"]
    assert second.status == "timeout"
    assert "within 2 seconds" in second.sentence
    assert "_sleep" in second.details["output"]
    assert status(found, "third") == "not_supported"


def test_what_a_hanging_case_started_is_killed_with_it() -> None:
    before = {child.pid for child in psutil.Process(1).children(recursive=True)}
    run("sleeps_with_child")
    time.sleep(0.2)
    after = psutil.Process(1).children(recursive=True)
    mine = [p for p in after if p.pid not in before and "time.sleep(600)" in " ".join(cmd(p))]
    assert mine == []


def cmd(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


def test_a_backend_that_always_hangs_is_given_up_but_no_result_is_missing() -> None:
    with Supervisor(settings("always_sleeps", timeout_scale=0.3)) as supervisor:
        (one,) = [task for task in tasks_of(supervisor) if task.case.id == "fake.second"]
        results = supervisor.run([Task(one.case, one.dtype, seed) for seed in range(20)])
    assert [r.status for r in results] == ["timeout"] * 20
    assert sum("not waited for" in r.sentence for r in results) == 20 - MAX_TIMEOUTS


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("open_raises", "fail"),
        ("open_aborts", "crash"),
        ("open_exits", "crash"),
        ("open_sleeps", "timeout"),
        ("open_returns_nothing", "fail"),
        ("no_such_function", "unknown"),
    ],
)
def test_a_backend_that_cannot_be_opened_says_how(backend: str, expected: str) -> None:
    with Supervisor(settings(backend, open_limit=3.0)) as supervisor:
        assert supervisor.describe().status == expected


def test_a_dtype_that_cannot_be_opened_fails_its_cases_only() -> None:
    found, _ = run("bfloat16_aborts")
    assert status(found, "first", "bfloat16") == "crash"
    assert "opening the backend" in found["fake.first", "bfloat16"].sentence
    assert status(found, "first") == "pass"


def test_a_crash_while_closing_is_a_fault_of_the_run() -> None:
    _, faults = run("close_aborts")
    assert len(faults) == 1
    assert "closing the backend" in faults[0]


def test_several_workers_give_the_same_results() -> None:
    found, faults = run("aborts", jobs=2)
    assert status(found, "second") == "crash"
    assert status(found, "first") == "pass"
    assert faults == []


def test_workers_end_when_the_supervisor_dies() -> None:
    script = (
        f"import sys, os, time; sys.path.insert(0, {str(HERE)!r})\n"
        "from vllm_core_conformance.supervisor import Settings, Supervisor\n"
        "s = Supervisor(Settings('fakes:open_sleeps', cases='fakes'))\n"
        "d = s._hire(); d.worker.ask({'do': 'describe'}, 'described', 60)\n"
        "print(d.worker._process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1.0)
    assert worker.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, _ = psutil.wait_procs([worker], timeout=5)
    assert gone or worker.status() == psutil.STATUS_ZOMBIE


def good_answer() -> dict[str, object]:
    return {
        "case": "fake.first", "dtype": "float32", "seed": 0, "status": "pass", "sentence": "",
        "checks": 1, "measures": [], "figures": {}, "notes": [], "details": {}, "traceback": "",
        "seconds": 0.1, "compilations": 0, "compiled": {}, "worker": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"case": "fake.second"},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"status": "excellent"},
        {"checks": 0},
        {"checks": True},
        {"seconds": "fast"},
        {"measures": [{"op": "add"}]},
        {"extra": 1},
    ],
)
def test_a_result_that_is_not_exactly_what_was_asked_for_is_refused(
    changes: dict[str, object],
) -> None:
    fakes = importlib.import_module("fakes")
    task = Task(fakes.all_cases()["fake.first"], "float32", 0)
    assert read_result(good_answer(), task).status == "pass"
    with pytest.raises(Broken):
        read_result(good_answer() | changes, task)


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    mine = psutil.Process(os.getpid()).children(recursive=True)
    assert [p for p in mine if "vllm_core_conformance.worker" in " ".join(cmd(p))] == []
