"""Draws the verdict from a report's own data: counts, class, headroom, compilations, pass or not.

Pure functions of plain data, so that `report --verify` can do it again from a file.

Knows: what a run must show to pass. Does not know: processes, files.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_core_conformance.outcome import GOOD, STATUSES
from vllm_core_conformance.score import CLASSES

Report = dict[str, Any]
"""A report as JSON has it."""

MAX_KEYS = 24
"""Programs of one op that a static-shape backend may have to compile."""
UNTAGGED = "untagged"
"""Programs that a case compiles anew on purpose: no op's keys."""

Name = tuple[str, str, int]


def name_of(result: Mapping[str, Any]) -> Name:
    return result["case"], result["dtype"], result["seed"]


def scored_results(report: Report) -> list[dict[str, Any]]:
    return [r for r in report["results"] if report["cases"][r["case"]]["scored"]]


def count_statuses(results: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Every status in the order of STATUSES, also those with none."""
    found = Counter(result["status"] for result in results)
    return {status: found.get(status, 0) for status in STATUSES}


def load_of(measure: Mapping[str, float]) -> float:
    """Share of the limits of class A that was used."""
    return max(measure["rms"] / measure["rms_limit"], measure["max"] / measure["max_limit"])


def headroom_of(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per op and dtype the measure that came nearest to its limit."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for measure in result["measures"]:
            load = load_of(measure)
            found = worst.get((measure["op"], result["dtype"]))
            if found is None or load > found["load"]:
                worst[measure["op"], result["dtype"]] = {
                    "op": measure["op"],
                    "dtype": result["dtype"],
                    "load": load,
                    "headroom": 1.0 / load if load else None,
                    "rms": measure["rms"],
                    "max": measure["max"],
                    "case": result["case"],
                    "seed": result["seed"],
                }
    return [worst[key] for key in sorted(worst)]


def class_of(headroom: Sequence[Mapping[str, Any]]) -> str | None:
    """The smallest class whose multiplier covers every measure; None where there is none."""
    if not headroom:
        return None
    load = max(entry["load"] for entry in headroom)
    return next((name for name, multiplier in CLASSES.items() if load <= multiplier), None)


def compilations_of(report: Report) -> dict[str, int]:
    """Keys per op: of one process in one dtype, since each compiles for itself; a case with a
    runtime of its own counts alone."""
    sums: dict[tuple[str, object], int] = defaultdict(int)
    for at, result in enumerate(report["results"]):
        is_fresh = report["cases"][result["case"]]["fresh"]
        place = at if is_fresh else (result["worker"], result["dtype"])
        for op, count in result["compiled"].items():
            sums[op, place] += count
    found: dict[str, int] = {}
    for (op, _), count in sums.items():
        found[op] = max(found.get(op, 0), count)
    return dict(sorted(found.items()))


def draw_verdict(report: Report) -> dict[str, Any]:
    """{"status", "reasons", "class", "declared_class", "hints"}: passed only when every scored
    case of the run was executed and none was wrong. What is wrong has no measure: then there is no
    class."""
    declared = report["backend"]["capabilities"].get("numeric_class")
    scored = scored_results(report)
    measured = class_of(headroom_of(scored))
    reasons = [*_missing(report), *_wrong(report, scored)]
    reasons += _class_reasons(report, scored, measured, declared) + _too_many_keys(report)
    opening = report["opening"]
    if report["interrupted"]:
        status = "incomplete"
    elif opening["status"] == "unverified":
        status = "unverified"
    elif reasons:
        status = "failed"
    elif scored:
        status = "passed"
    else:
        status = "unscored"
    hints = []
    if measured and declared in CLASSES and CLASSES[measured] < CLASSES[declared]:
        hints.append(f"class {declared} is declared, {measured} was measured: declare {measured}")
    hints += sorted({r["sentence"] for r in scored if r["status"] == "not_supported"} - {""})
    return {
        "status": status,
        "reasons": reasons,
        "class": None if any(r["status"] not in GOOD for r in scored) else measured,
        "declared_class": declared,
        "hints": hints,
    }


def _missing(report: Report) -> list[str]:
    reasons = []
    if report["interrupted"]:
        reasons.append(f"interrupted: {report['interrupted']}")
    if report["opening"]["status"] != "ok":
        reasons.append(f"the backend could not be opened: {report['opening']['sentence']}")
    expected = Counter((case, dtype, seed) for case, dtype, seed in report["expected"])
    got = Counter(name_of(result) for result in report["results"])
    if not expected:
        reasons.append("no case was asked for")
    lost, extra = expected - got, got - expected
    if lost:
        reasons.append(f"{lost.total()} results are missing, {_first(lost)} among them")
    if extra:
        reasons.append(f"{extra.total()} results were not asked for, {_first(extra)} among them")
    return reasons


def _first(names: Counter[Name]) -> str:
    case, dtype, seed = min(names)
    return f"{case} ({dtype}, seed {seed})"


def _wrong(report: Report, scored: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons = [f"{fault}" for fault in report["faults"]]
    counts = count_statuses(scored)
    if report["opening"]["status"] == "ok":
        reasons += [
            f"{count} of {len(scored)} scored results: {status} ({STATUSES[status]})"
            for status, count in counts.items()
            if count and status not in GOOD
        ]
    if scored and not counts["pass"]:
        reasons.append("no scored case passed")
    if not scored and any(r["status"] not in GOOD for r in report["results"]):
        reasons.append("an unscored case did not pass")
    empty = [r for r in report["results"] if r["status"] == "pass" and r["checks"] <= 0]
    if empty:
        reasons.append(f"{len(empty)} passes without a comparison, {empty[0]['case']} among them")
    return reasons


def _class_reasons(
    report: Report, scored: Sequence[Mapping[str, Any]], measured: str | None, declared: str | None
) -> list[str]:
    if report["opening"]["status"] != "ok":
        return []
    if declared not in CLASSES:
        return [f"the declared numeric class {declared!r} is none of {', '.join(CLASSES)}"]
    headroom = headroom_of(scored)
    if not headroom or (measured and CLASSES[measured] <= CLASSES[declared]):
        return []
    worst = max(headroom, key=lambda entry: float(entry["load"]))
    return [
        f"class {declared} is declared, but {worst['op']} in {worst['dtype']} is of class "
        f"{measured or 'none'} ({worst['load']:.3g} times the limits of A, {worst['case']})"
    ]


def _too_many_keys(report: Report) -> list[str]:
    if "core" not in report["profiles"] or not report["backend"]["capabilities"].get(
        "static_shapes"
    ):
        return []
    return [
        f"{count} programs of {op} were compiled; at most {MAX_KEYS} are allowed"
        for op, count in compilations_of(report).items()
        if count > MAX_KEYS and op != UNTAGGED
    ]
