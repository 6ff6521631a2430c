"""Checks that a report is whole and says what its own results say.

It finds what was removed or edited by mistake or in hope; it is no signature.

Knows: the schema, the suite that is installed. Does not know: whether the run was honest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm_core_conformance import REQUIREMENTS, __version__
from vllm_core_conformance.case import Case
from vllm_core_conformance.report.build import (
    case_facts,
    checksum,
    complete,
    required_digest,
)
from vllm_core_conformance.report.verdict import Report, name_of
from vllm_core_conformance.tasks import Wanted, cases_digest, plan_tasks, select_cases

DERIVED = ("counts", "unscored_counts", "headroom", "compilations", "verdict")


def verify(report: Report, cases: Mapping[str, Case]) -> tuple[list[str], list[str]]:
    """(what is wrong, what could not be checked); `cases`: those of the installed suite."""
    wrong: list[str] = []
    try:
        if checksum(report) != report.get("checksum"):
            wrong.append("the checksum is not that of the content: it was edited")
        drawn = complete(report)
        wrong += [
            f"{name}: the report says {_short(report.get(name))}, its results say "
            f"{_short(drawn[name])}"
            for name in DERIVED
            if drawn[name] != report.get(name)
        ]
        wrong += _check_names(report)
        suite = report["suite"]
        if (suite["version"], suite["requirements"]) != (__version__, REQUIREMENTS):
            said = f"made with suite {suite['version']} ({suite['requirements']}), installed is "
            said += f"{__version__} ({REQUIREMENTS}): whether every case is there was not checked"
            return wrong, [said]
        wrong += _check_cases(report, cases)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong.append(f"a field is missing or of another kind: {type(error).__name__}: {error}")
    return wrong, []


def _check_names(report: Report) -> list[str]:
    wrong = []
    counts = Counter(name_of(result) for result in report["results"])
    double = [name for name, count in counts.items() if count > 1]
    if double:
        wrong.append(f"{double[0][0]} has more than one result for one dtype and seed")
    if report["is_whole"]:
        ids = [case for case, facts in report["cases"].items() if facts["scored"]]
        suite = report["suite"]
        if cases_digest(ids, suite["requirements"], suite["version"]) != report["cases_digest"]:
            wrong.append("its scored cases are not those of its digest: some were removed or added")
    return wrong


def _check_cases(report: Report, cases: Mapping[str, Case]) -> list[str]:
    wrong = []
    if required_digest(cases.values(), report["profiles"]) != report["cases_digest"]:
        wrong.append(
            f"its digest is not that of requirement set {REQUIREMENTS} for "
            f"{','.join(report['profiles'])}"
        )
    for id, facts in report["cases"].items():
        if id not in cases:
            wrong.append(f"the suite has no case {id}")
        elif case_facts(cases[id]) != facts:
            wrong.append(f"what it says of case {id} is not what the suite says")
    if wrong or report["opening"]["status"] != "ok":
        return wrong
    selection, seeds = report["selection"], report["seeds"]
    if report["is_whole"] != (selection["cases"] is None and not selection["dtypes"]):
        wrong.append("it says of itself that it is whole, but its selection says otherwise")
    wanted = Wanted(
        tuple(report["profiles"]),
        selection["cases"],
        tuple(selection["dtypes"]),
        seeds[0],
        len(seeds),
    )
    backend = report["backend"]
    tasks = plan_tasks(
        select_cases(cases, wanted), wanted, backend["capabilities"], backend["default_dtype"]
    )
    missing = Counter(task.name for task in tasks) - Counter(map(tuple, report["expected"]))
    if missing:
        case, dtype, seed = min(missing)
        wrong.append(
            f"{missing.total()} results that the profile requires were not asked for, "
            f"{case} ({dtype}, seed {seed}) among them"
        )
    return wrong


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
