"""Runs one case on one target in this process and says what it was.

Knows: statuses, which exception means what. Does not know: processes, reports.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from vllm_core.errors import NotSupported
from vllm_core_conformance.case import Case, Evidence, Failed, Measure
from vllm_core_conformance.target import Raised, Target

STATUSES = {
    "pass": "right",
    "fail": "wrong",
    "not_supported": "undeclared, and refused with NotSupported",
    "capability_lie": "declared and refused, or undeclared, accepted and wrong",
    "crash": "the worker process died",
    "timeout": "no answer in the time of the case",
    "harness_error": "the suite itself failed",
    "unverified": "no hardware",
}
GOOD = frozenset({"pass", "not_supported"})
"""Statuses with which a run can pass."""


@dataclass
class Result:
    """One case, in one dtype, with one seed: plain data."""

    case: str
    dtype: str
    seed: int
    status: str
    sentence: str = ""
    """What went wrong, in the words of the domain; or a hint."""
    checks: int = 0
    measures: list[Measure] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""
    seconds: float = 0.0
    compilations: int = 0
    compiled: dict[str, int] = field(default_factory=dict)
    """Compilations by op, as far as the case names its programs."""
    worker: int = 0
    """Which process ran it: each compiles for itself."""


def undeclared(case: Case, target: Target) -> list[str]:
    """Which of the case's needs the backend does not declare."""
    missing = []
    for need in case.needs:
        name, _, value = need.partition(":")
        if name == "dtype":
            is_there = value in target.caps.dtypes
        elif name == "head_dim":
            is_there = int(value) <= target.caps.max_head_dim
        elif name == "scheme":
            is_there = value in target.caps.schemes
        elif name == "kv":
            is_there = value in target.caps.kv_dtypes
        else:
            is_there = bool(getattr(target.caps, name))
        if not is_there:
            missing.append(need)
    return missing


def execute(case: Case, target: Target, seed: int) -> Result:
    """Never raises for a fault of the backend or of the suite; KeyboardInterrupt passes."""
    begin = time.perf_counter()
    result = Result(case.id, target.dtype, seed, "pass")
    own: Target | None = None
    missing: list[str] = []
    try:
        own = target.fresh() if case.fresh else target
        missing = undeclared(case, own)
        before, by_op = own.runtime.num_compilations(), dict(own.compiled)
        try:
            _take(result, case.run(own, seed))
        finally:
            result.compilations = own.runtime.num_compilations() - before
            more = {op: count - by_op.get(op, 0) for op, count in own.compiled.items()}
            result.compiled = {op: count for op, count in more.items() if count}
        if missing and result.status == "pass":
            result.status = "not_supported"
            result.sentence = f"works although undeclared; declare {', '.join(missing)}"
    except Failed as failure:
        result.status, result.sentence = "fail", failure.sentence
        result.details = dict(failure.details)
        if missing:
            result.status = "capability_lie"
            result.sentence = f"{', '.join(missing)} undeclared, yet accepted; {failure.sentence}"
    except Raised as raised:
        result.traceback = traceback.format_exc()
        result.status, result.sentence = "fail", str(raised)
        if isinstance(raised.error, NotSupported):
            result.status = "not_supported" if missing else "capability_lie"
    except Exception as error:
        result.traceback = traceback.format_exc()
        result.status, result.sentence = "harness_error", f"{type(error).__name__}: {error}"
    if case.fresh and own is not None:
        try:
            own.close()
        except Raised as raised:
            result.notes.append(str(raised))
    result.seconds = time.perf_counter() - begin
    return result


def _take(result: Result, evidence: Evidence) -> None:
    result.checks, result.measures = evidence.checks, evidence.measures
    result.figures, result.notes = evidence.figures, evidence.notes
    if evidence.checks == 0:
        result.status = "harness_error"
        result.sentence = "the case made no comparison"
