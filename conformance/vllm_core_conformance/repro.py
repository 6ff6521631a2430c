"""`vllm-core conformance repro`: one case alone, in a worker, with everything that is known of it.

Knows: one task, the script that does the same in one process. Does not know: profiles, reports.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_core_conformance import __version__
from vllm_core_conformance.case import Case
from vllm_core_conformance.outcome import GOOD, STATUSES, Result
from vllm_core_conformance.running import cases_of, tasks_of, unopened
from vllm_core_conformance.supervisor import CASES, Settings, Supervisor
from vllm_core_conformance.tasks import BadRequest, Task, Wanted

SCRIPT = '''\
"""{case} on {backend}, {dtype}, seed {seed}: {status}.

Demanded: {says}
Made by vllm-core-conformance {version}; needs it and the backend. Runs in one process: a debugger
and prints work. Exit code 0 when the backend is right.
"""

import faulthandler
import sys
import traceback

sys.path.insert(0, "")  # a backend in the current folder is found

from {cases} import all_cases
from vllm_core_conformance.case import Failed
from vllm_core_conformance.sources import resolve
from vllm_core_conformance.target import Target

BACKEND, CASE, DTYPE, SEED = {backend!r}, {case!r}, {dtype!r}, {seed}

faulthandler.enable()
faulthandler.dump_traceback_later({limit}, exit=True)  # it hangs: say where
target = Target(resolve(BACKEND), DTYPE)
try:
    evidence = all_cases()[CASE].run(target, SEED)
except Failed as failure:
    print(f"wrong: {{failure.sentence}}")
    for name, value in failure.details.items():
        print(f"  {{name}}: {{value}}")
    sys.exit(1)
except Exception:
    traceback.print_exc()
    sys.exit(1)
print(f"right: {{evidence.checks}} comparisons")
'''


def reproduce(args: argparse.Namespace) -> int:
    cases = cases_of(args.suite or CASES)
    case = cases.get(args.case)
    if case is None:
        raise BadRequest(f"there is no case {args.case!r}; `vllm-core conformance list` names them")
    task, result = _run_alone(args, case)
    print(f"{case.id} ({task.dtype}, seed {task.seed}): {result.status}, {_meaning(result)}")
    print(f"  demanded: {case.says}")
    _print_details(result)
    if args.write_script is not None:
        text = script_for(task, args.backend, result.status, args.suite or CASES)
        _write(args.write_script, text)
        print(f"  script: python {args.write_script}")
    if result.status == "unverified":
        return 3
    return 0 if result.status in GOOD else 1


def _run_alone(args: argparse.Namespace, case: Case) -> tuple[Task, Result]:
    settings = Settings(args.backend, timeout_scale=args.timeout_scale, cases=args.suite or CASES)
    dtypes = () if args.dtype == "auto" else (args.dtype,)
    wanted = Wanted(tuple(case.profiles), dtypes=dtypes, seed=args.seed)
    with Supervisor(settings) as supervisor:
        description = supervisor.describe()
        (task, *_) = tasks_of(description, [case], wanted)
        if description.status != "ok":
            result = unopened(description, task)
            result.traceback = description.traceback
            return task, result
        return task, supervisor.run_one(task)


def _meaning(result: Result) -> str:
    return f"{STATUSES[result.status]} ({result.checks} comparisons, {result.seconds:.2f} s)"


def _print_details(result: Result) -> None:
    if result.sentence:
        print(f"  {result.sentence}")
    for note in result.notes:
        print(f"  note: {note}")
    for measure in result.measures:
        print(
            f"  {measure.op}: rms {measure.rms:.3g} of {measure.rms_limit:.3g}, "
            f"max {measure.max:.3g} of {measure.max_limit:.3g} over {measure.count} elements"
        )
    for name, value in result.figures.items():
        print(f"  {name}: {value}")
    for name, value in result.details.items():
        if name != "output":
            print(f"  {name}: {json.dumps(value)}")
    for title, text in (
        ("what the backend printed", str(result.details.get("output", ""))),
        ("traceback", result.traceback),
    ):
        if text.strip():
            print(f"  {title}:")
            print("\n".join(f"    {line}" for line in text.rstrip().splitlines()))


def script_for(task: Task, backend: str, status: str, cases: str = CASES) -> str:
    """At most 40 lines of Python that run the case in one process."""
    return SCRIPT.format(
        case=task.case.id,
        says=_sentence(task.case.says),
        backend=backend,
        dtype=task.dtype,
        seed=task.seed,
        status=status,
        version=__version__,
        cases=cases,
        limit=task.case.time_limit,
    )


def _sentence(says: str) -> str:
    """One line that cannot end a docstring."""
    text = " ".join(says.split()).replace("\\", "/").replace('"', "'")
    return text if text.endswith(".") else f"{text}."


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise BadRequest(f"--write-script {path} cannot be written: {error.strerror}") from error
