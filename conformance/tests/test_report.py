"""Reports: consistent, hard to embellish by mistake, and the same in every form."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vllm_core_conformance.case import Measure
from vllm_core_conformance.outcome import Result
from vllm_core_conformance.report.badge import to_badge
from vllm_core_conformance.report.build import (
    BadReport,
    Run,
    build_report,
    complete,
    dump,
    read_report,
    scrub,
    seal,
)
from vllm_core_conformance.report.html import to_html
from vllm_core_conformance.report.markdown import to_markdown
from vllm_core_conformance.report.support import support_matrix
from vllm_core_conformance.report.verdict import class_of, compilations_of
from vllm_core_conformance.report.verify import verify
from vllm_core_conformance.running import exit_code
from vllm_core_conformance.supervisor import Description
from vllm_core_conformance.tasks import Wanted, plan_tasks, select_cases

Report = dict[str, Any]
CAPS = {"dtypes": ["bfloat16", "float32"], "numeric_class": "A", "static_shapes": True}
FACTS = {"name": "acme", "distribution": "vllm-core-acme", "version": "1.0", "dtype": "float32"}


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def make(change: Callable[[Result], None] = lambda result: None, **facts: Any) -> Report:
    """A report of a run that was right but for `change`."""
    fakes = importlib.import_module("fakes")
    wanted = Wanted(("core",))
    caps = CAPS | facts.pop("caps", {})
    description = Description("ok", facts=FACTS | {"capabilities": caps} | facts)
    cases = fakes.all_cases()
    tasks = plan_tasks(select_cases(cases, wanted), wanted, caps, "float32")
    results = []
    for task in tasks:
        measure = Measure("attention", 0.1, 1.0, 9, 0.42, 2.5)
        result = Result(*task.name, "pass", checks=9, measures=[measure], worker=1)
        change(result)
        results.append(result)
    return build_report(Run(wanted, description, tasks, results, "acme", 1.0), cases)


def verdict(report: Report) -> tuple[str, str]:
    found = report["verdict"]
    return found["status"], "; ".join(found["reasons"])


def wrong(report: Report) -> list[str]:
    fakes = importlib.import_module("fakes")
    return verify(report, fakes.all_cases())[0]


def set_status(case: str, status: str) -> Callable[[Result], None]:
    def change(result: Result) -> None:
        if result.case == case:
            result.status = status

    return change


def test_a_right_run_passes_in_its_class_and_verifies() -> None:
    report = make()
    assert verdict(report) == ("passed", "")
    assert report["verdict"]["class"] == "A"
    assert wrong(report) == []
    assert exit_code(report) == 0


@pytest.mark.parametrize(
    "status", ["fail", "capability_lie", "crash", "timeout", "harness_error", "unverified"]
)
def test_one_scored_result_that_is_not_good_fails_the_run(status: str) -> None:
    report = make(set_status("fake.second", status))
    assert verdict(report)[0] == "failed"
    assert status in verdict(report)[1]
    assert exit_code(report) == 1


def test_an_unscored_case_never_decides() -> None:
    assert verdict(make(set_status("fake.speed", "fail")))[0] == "passed"


def test_refusing_everything_is_no_pass() -> None:
    def refuse(result: Result) -> None:
        result.status = "not_supported"

    assert "no scored case passed" in verdict(make(refuse))[1]


def test_a_result_that_is_missing_fails_the_run() -> None:
    report = make()
    report["results"].pop(1)
    assert "1 results are missing" in verdict(complete(report))[1]


def test_a_result_that_was_not_asked_for_fails_the_run() -> None:
    report = make()
    report["results"].append(report["results"][0])
    assert "not asked for" in verdict(complete(report))[1]


def test_a_run_of_nothing_does_not_pass() -> None:
    report = make()
    report["expected"], report["results"] = [], []
    assert verdict(complete(report))[0] == "failed"


def test_a_class_worse_than_declared_fails_and_a_better_one_is_a_hint() -> None:
    def worse(result: Result) -> None:
        result.measures = [replace(m, rms=1.0) for m in result.measures]

    assert "class A is declared, but attention" in verdict(make(worse))[1]
    assert verdict(make(worse, caps={"numeric_class": "B"}))[0] == "passed"
    better = make(caps={"numeric_class": "B"})
    assert verdict(better)[0] == "passed"
    assert "declare A" in better["verdict"]["hints"][0]
    assert class_of([{"load": 70.0}]) is None


def test_more_than_24_programs_of_an_op_fail_core_on_a_static_device_only() -> None:
    def compile_much(result: Result) -> None:
        result.compiled = {"attend": 9, "untagged": 99}

    report = make(compile_much)
    assert report["compilations"]["attend"] == 36  # four results of one worker in float32
    assert "36 programs of attend" in verdict(report)[1]
    assert "untagged" not in verdict(report)[1]
    assert verdict(make(compile_much, caps={"static_shapes": False}))[0] == "passed"


def test_each_process_compiles_for_itself() -> None:
    def compile_some(result: Result) -> None:
        result.compiled = {"attend": 9}
        result.worker = {"fake.first": 1, "fake.second": 2}.get(result.case, 3)

    assert compilations_of(make(compile_some))["attend"] == 18


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r["results"][1].update(status="pass"),
        lambda r: r["results"].pop(1),
        lambda r: r["counts"].update({"fail": 0, "pass": 9}),
        lambda r: r["verdict"].update(status="passed", reasons=[]),
        lambda r: r["cases"]["fake.second"].update(scored=False),
        lambda r: r.pop("headroom"),
        lambda r: r.update(profiles=["serving"]),
        lambda r: r["host"].update(cpus=4096),
    ],
)
def test_an_edited_report_is_seen(edit: Callable[[Report], Any]) -> None:
    report = make(set_status("fake.second", "fail"))
    assert wrong(report) == []
    edit(report)
    assert wrong(report)


def test_a_report_without_one_case_is_seen_although_it_is_sealed_anew() -> None:
    report = make(set_status("fake.second", "fail"))
    report["expected"] = [e for e in report["expected"] if e[0] != "fake.second"]
    report["results"] = [r for r in report["results"] if r["case"] != "fake.second"]
    del report["cases"]["fake.second"]
    forged = seal(complete(report))
    assert forged["verdict"]["status"] == "passed"
    assert any("removed" in sentence for sentence in wrong(forged))


def test_a_report_without_one_dtype_is_seen_although_it_is_sealed_anew() -> None:
    report = make()
    report["expected"] = [e for e in report["expected"] if e[1] == "float32"]
    report["results"] = [r for r in report["results"] if r["dtype"] == "float32"]
    assert any("not asked for" in sentence for sentence in wrong(seal(complete(report))))


def test_no_path_and_no_host_name_reaches_a_report() -> None:
    said = 'File "/home/someone/lib/attention.py", line 3; 1/2 of http://example.org/a/b'
    assert scrub(said) == 'File "…/attention.py", line 3; 1/2 of http://example.org/a/b'

    def leak(result: Result) -> None:
        result.details = {"output": ["/home/someone/x.py"]}

    assert "/home/someone" not in dump(make(leak))


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    report = make()
    (tmp_path / "report.json").write_text(dump(report))
    assert read_report(tmp_path) == report
    (tmp_path / "report.json").write_text(json.dumps(report | {"schema_version": 99}))
    with pytest.raises(BadReport, match="schema 99"):
        read_report(tmp_path)


def failing() -> Report:
    def change(result: Result) -> None:
        if result.case == "fake.second":
            result.status = "fail"
            result.sentence = "query 3 returned token 143 <b>& expected 144 | off by one"
        if result.case == "fake.speed":
            result.figures = {"copy GB/s": 12.5}

    return make(change)


def test_the_page_is_self_contained_and_shows_failures_with_their_command() -> None:
    page = to_html(failing())
    assert "query 3 returned token 143 &lt;b&gt;&amp; expected 144" in page
    assert "vllm-core conformance repro fake.second --backend acme --seed 0" in page
    assert "prefers-color-scheme: dark" in page
    assert "copy GB/s" in page
    for foreign in ("http://", "https://", "<script", "<link", "url(", "@import", "src="):
        assert foreign not in page


def test_markdown_has_the_same_facts() -> None:
    text = to_markdown(failing())
    assert "query 3 returned token 143 &lt;b>& expected 144 \\| off by one" in text
    assert "| fake |" in text
    assert "copy GB/s" in text


def test_the_badge_names_set_profile_and_class() -> None:
    passed, failed = to_badge(make()), to_badge(failing())
    assert "2026.1 core-A" in passed
    assert "core-A" not in failed
    assert ElementTree.fromstring(passed).tag.endswith("svg")


def test_the_support_matrix_is_deterministic_and_knows_the_unverified() -> None:
    one, two = make(), failing()
    text = support_matrix([one, two], ["far-away"])
    assert text == support_matrix([copy.deepcopy(two), one], ["far-away"])
    lines = text.splitlines()
    assert any("| far-away |" in line and "unverified" in line for line in lines)
    assert "| fake | second | **fails** 1 of 2 | unverified |" in lines
