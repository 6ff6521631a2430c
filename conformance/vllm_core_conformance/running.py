"""One run from start to report: describe the backend, plan, run, judge.

Knows: the order of things. Does not know: terminals, files.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence

from vllm_core_conformance.case import Case
from vllm_core_conformance.outcome import GOOD, Result
from vllm_core_conformance.report.build import Run, build_report
from vllm_core_conformance.report.verdict import Report
from vllm_core_conformance.supervisor import Description, Settings, Supervisor
from vllm_core_conformance.tasks import (
    BadRequest,
    Task,
    Wanted,
    plan_tasks,
    select_cases,
    unopened_tasks,
)

OnPlan = Callable[[Description, Sequence[Task]], None]
OnResult = Callable[[Task, Result], None]


def cases_of(module: str) -> Mapping[str, Case]:
    """All cases that a module brings."""
    found: Mapping[str, Case] = importlib.import_module(module).all_cases()
    return found


def run_conformance(
    wanted: Wanted,
    settings: Settings,
    *,
    on_plan: OnPlan = lambda description, tasks: None,
    on_result: OnResult = lambda task, result: None,
    fail_fast: bool = False,
) -> Report:
    """The sealed report. Ctrl-C ends it at once, with a report that says so.

    BadRequest for what does not exist: a backend's name, a profile, a dtype.
    """
    cases = cases_of(settings.cases)
    chosen = select_cases(cases, wanted)
    begin = time.monotonic()
    run = Run(wanted, Description("fail", "interrupted"), [], [], settings.backend)

    def take(task: Task, result: Result) -> bool:
        on_result(task, result)
        return fail_fast and task.case.scored and result.status not in GOOD

    supervisor = Supervisor(settings)
    try:
        with supervisor:
            run.description = supervisor.describe()
            run.tasks = tasks_of(run.description, chosen, wanted)
            on_plan(run.description, run.tasks)
            if run.description.status == "ok":
                run.results = supervisor.run(run.tasks, take)
            else:
                run.results = [unopened(run.description, task) for task in run.tasks]
        if len(run.results) < len(run.tasks):
            run.interrupted = "it was to end at the first failure (--fail-fast)"
    except KeyboardInterrupt:
        supervisor.kill()
        run.interrupted = "by the caller (Ctrl-C)"
        run.tasks = run.tasks or unopened_tasks(chosen, wanted)
        run.results = list(supervisor.results)
    run.faults, run.seconds = list(supervisor.faults), time.monotonic() - begin
    return build_report(run, cases)


def tasks_of(description: Description, chosen: Sequence[Case], wanted: Wanted) -> list[Task]:
    """BadRequest when no backend has the name, or it does not declare a dtype."""
    if description.status == "unknown":
        raise BadRequest(description.sentence)
    if description.status != "ok":
        return unopened_tasks(chosen, wanted)
    facts = description.facts
    return plan_tasks(chosen, wanted, facts["capabilities"], facts["dtype"])


def unopened(description: Description, task: Task) -> Result:
    """The result of a case of a backend that cannot be opened."""
    sentence = description.sentence
    if description.status != "unverified" and not sentence.startswith("opening"):
        sentence = f"opening the backend: {sentence}"
    return Result(task.case.id, task.dtype, task.seed, description.status, sentence)


def exit_code(report: Report) -> int:
    """0 passed, 1 not, 3 nothing could be verified, 130 interrupted by the caller."""
    if report["interrupted"].startswith("by the caller"):
        return 130
    codes = {"passed": 0, "unscored": 0, "unverified": 3}
    return codes.get(report["verdict"]["status"], 1)
