"""Builds report.json: what ran on what, with which results, and the verdict.

Holds no machine path and no host name: a report is made to be handed on.

Knows: facts of this host, versions. Does not know: how a report looks.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import vllm_core
from vllm_core.backend import SEAM_VERSION
from vllm_core_conformance import REQUIREMENTS, __version__
from vllm_core_conformance.case import Case
from vllm_core_conformance.outcome import Result
from vllm_core_conformance.report.verdict import (
    Report,
    compilations_of,
    count_statuses,
    draw_verdict,
    headroom_of,
    scored_results,
)
from vllm_core_conformance.supervisor import Description
from vllm_core_conformance.tasks import Task, Wanted, cases_digest

SCHEMA_VERSION = 1
TEXTS = ("sentence", "notes", "details", "traceback")
"""Fields of a result that hold what a vendor's code said."""

_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/\"':,;<>()]+/)+([^\s/\"':,;<>()]+)")


class BadReport(Exception):
    """A file is no report, or not of a schema that is known."""


@dataclass
class Run:
    """What a supervisor did, as the report needs it."""

    wanted: Wanted
    description: Description
    tasks: Sequence[Task]
    results: Sequence[Result]
    backend: str
    """As the caller named it."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    interrupted: str = ""
    """Why not every task was run; empty where it was."""


def build_report(run: Run, cases: Mapping[str, Case]) -> Report:
    """The report as plain data; `cases`: all of the suite."""
    used = {task.case.id: task.case for task in run.tasks}
    facts = run.description.facts
    results = [asdict(result) for result in run.results]
    results = [r | {name: scrub(r[name]) for name in TEXTS} for r in results]
    report: Report = {
        "schema_version": SCHEMA_VERSION,
        "suite": {"version": __version__, "requirements": REQUIREMENTS},
        "core": vllm_core.__version__,
        "seam": ".".join(map(str, SEAM_VERSION)),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "profiles": list(run.wanted.profiles),
        "selection": {"cases": run.wanted.cases, "dtypes": list(run.wanted.dtypes)},
        "is_whole": run.wanted.is_whole,
        "cases_digest": required_digest(cases.values(), run.wanted.profiles),
        "backend": {
            "name": facts.get("name", run.backend),
            "distribution": facts.get("distribution"),
            "version": facts.get("version"),
            "summary": facts.get("summary", ""),
            "default_dtype": facts.get("dtype"),
            "capabilities": facts.get("capabilities", {}),
        },
        "devices": scrub(facts.get("devices", [])),
        "host": host_facts() | {"packages": facts.get("packages", {})},
        "opening": {
            "status": run.description.status,
            "sentence": scrub(run.description.sentence),
            "traceback": scrub(run.description.traceback),
        },
        "seeds": run.wanted.seeds,
        "dtypes": sorted({task.dtype for task in run.tasks}),
        "cases": {id: case_facts(case) for id, case in used.items()},
        "expected": [list(task.name) for task in run.tasks],
        "results": results,
        "faults": scrub(list(run.faults)),
        "interrupted": run.interrupted,
        "seconds": round(run.seconds, 3),
    }
    return seal(complete(report))


def complete(report: Report) -> Report:
    """Adds everything that follows from the results."""
    scored = scored_results(report)
    others = [r for r in report["results"] if not report["cases"][r["case"]]["scored"]]
    return report | {
        "counts": count_statuses(scored),
        "unscored_counts": count_statuses(others),
        "headroom": headroom_of(scored),
        "compilations": compilations_of(report),
        "verdict": draw_verdict(report),
    }


def case_facts(case: Case) -> dict[str, Any]:
    return {
        "says": case.says,
        "area": case.area,
        "profiles": sorted(case.profiles),
        "needs": list(case.needs),
        "every_dtype": case.every_dtype,
        "scored": case.scored,
        "fresh": case.fresh,
    }


def required_digest(cases: Iterable[Case], profiles: Sequence[str]) -> str:
    """Of every scored case of the profiles."""
    ids = [case.id for case in cases if case.scored and case.profiles & set(profiles)]
    return cases_digest(ids, REQUIREMENTS, __version__)


def host_facts() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": psutil.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def scrub(value: Any) -> Any:
    """The same without host name; of paths only the last name is left."""
    if isinstance(value, str):
        host = socket.gethostname()
        if len(host) > 3:
            value = re.sub(rf"\b{re.escape(host)}\b", "<host>", value)
        return _PATH.sub(r"…/\1", value)
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return value


# ---- files
def checksum(report: Report) -> str:
    rest = {key: value for key, value in report.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(report: Report) -> Report:
    return report | {"checksum": checksum(report)}


def dump(report: Report) -> str:
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """A report file, or report.json of a folder; BadReport when it is none."""
    if path.is_dir():
        path = path / "report.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadReport(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or "schema_version" not in found:
        raise BadReport(f"{path} is no report of this suite")
    if found["schema_version"] != SCHEMA_VERSION:
        raise BadReport(
            f"{path} has schema {found['schema_version']!r}, this suite reads {SCHEMA_VERSION}"
        )
    return found
