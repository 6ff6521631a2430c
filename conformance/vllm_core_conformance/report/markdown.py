"""A report as Markdown.

Knows: report.json. Does not know: where it comes from.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_core_conformance.outcome import GOOD, STATUSES
from vllm_core_conformance.report.verdict import Report, count_statuses, scored_results


def badge_text(report: Report) -> str:
    """ "2026.1 core-A", or why there is no such badge."""
    verdict = report["verdict"]
    profiles = "+".join(report["profiles"])
    requirements = report["suite"]["requirements"]
    if verdict["status"] != "passed":
        return f"{requirements} {profiles} {verdict['status']}"
    if not report["is_whole"]:
        return f"{requirements} {profiles} partial"
    grade = verdict["class"] or verdict["declared_class"]
    return f"{requirements} {profiles}-{grade}"


def repro_command(report: Report, result: dict[str, Any]) -> str:
    words = ["vllm-core", "conformance", "repro", result["case"]]
    words += ["--backend", report["backend"]["name"]]
    words += ["--seed", str(result["seed"]), "--dtype", result["dtype"]]
    return shlex.join(words)


def area_of(case: str) -> str:
    return case.partition(".")[0]


def op_of(case: str) -> str:
    """ "ops.rope.yarn" -> "rope"."""
    parts = case.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def counts_by_area(report: Report) -> dict[str, dict[str, int]]:
    """Of the scored results."""
    by_area: dict[str, list[dict[str, Any]]] = {}
    for result in scored_results(report):
        by_area.setdefault(area_of(result["case"]), []).append(result)
    return {area: count_statuses(results) for area, results in by_area.items()}


def failures(report: Report) -> list[dict[str, Any]]:
    """Scored results that are not good, in the order of the run."""
    return [r for r in scored_results(report) if r["status"] not in GOOD]


def performance(report: Report) -> list[dict[str, Any]]:
    """Unscored results with figures: they stand apart from correctness."""
    is_scored = {case: facts["scored"] for case, facts in report["cases"].items()}
    return [r for r in report["results"] if not is_scored[r["case"]] and r["figures"]]


def describe_backend(report: Report) -> str:
    backend = report["backend"]
    origin = " ".join(filter(None, (backend["distribution"], backend["version"])))
    return f"{backend['name']} ({origin})" if origin else str(backend["name"])


def describe_devices(report: Report) -> str:
    told = ", ".join(f"{d['kind']} {d['index']} ({d['arch']})" for d in report["devices"])
    return told or "a device that was not named"


def describe_host(report: Report) -> str:
    host = report["host"]
    return (
        f"{host['system']} {host['machine']}, {host['cpus']} CPUs, {host['memory_gib']} GiB, "
        f"Python {host['python']}"
    )


def describe_versions(report: Report) -> str:
    return (
        f"suite {report['suite']['version']} ({report['suite']['requirements']}), "
        f"core {report['core']}, seam {report['seam']}"
    )


def facts_of(report: Report) -> list[tuple[str, str]]:
    """The head of every form of a report."""
    verdict = report["verdict"]
    packages = ", ".join(f"{k} {v}" for k, v in sorted(report["host"]["packages"].items()))
    return [
        ("verdict", f"{verdict['status']}: {badge_text(report)}"),
        ("numeric class", f"{verdict['class'] or 'not measured'}, declared "
                          f"{verdict['declared_class'] or 'nothing'}"),
        ("backend", describe_backend(report)),
        ("devices", describe_devices(report)),
        ("profiles", ", ".join(report["profiles"])),
        ("dtypes", ", ".join(report["dtypes"])),
        ("seeds", ", ".join(map(str, report["seeds"]))),
        ("versions", describe_versions(report)),
        ("host", describe_host(report)),
        ("packages", packages or "none"),
        ("date", report["date"]),
        ("seconds", f"{report['seconds']:.1f}"),
    ]  # fmt: skip


def to_markdown(report: Report) -> str:
    verdict = report["verdict"]
    lines = [f"# Conformance of {describe_backend(report)}", ""]
    lines += _table(("", ""), facts_of(report))
    lines += _list("Why it did not pass", verdict["reasons"])
    lines += _list("Hints", verdict["hints"])
    lines += ["## Results by area", ""]
    by_area = counts_by_area(report)
    used = [s for s in STATUSES if any(counts[s] for counts in by_area.values())]
    rows = [(area, *(str(counts[s]) for s in used)) for area, counts in by_area.items()]
    lines += _table(("area", *used), rows)
    bad = failures(report)
    if bad:
        lines += ["## Failures", ""]
    for result in bad:
        lines += [
            f"### `{result['case']}` ({result['dtype']}, seed {result['seed']}): "
            f"{result['status']}",
            "",
            _escape(result["sentence"]),
            "",
            f"    {repro_command(report, result)}",
            "",
        ]
    lines += ["## Headroom", "", "Limit of class A over the worst error, per op.", ""]
    rows = [(h["op"], h["dtype"], format_headroom(h), f"`{h['case']}`") for h in report["headroom"]]
    lines += _table(("op", "dtype", "headroom", "worst case"), rows)
    if any(report["compilations"].values()):
        lines += ["## Compilations", ""]
        lines += _table(
            ("op", "programs"), [(op, str(n)) for op, n in report["compilations"].items()]
        )
    lines += _performance_lines(report)
    return "\n".join(lines).rstrip() + "\n"


def format_headroom(entry: dict[str, Any]) -> str:
    return f"{entry['headroom']:.3g}" if entry["headroom"] is not None else "exact"


def _performance_lines(report: Report) -> list[str]:
    found = performance(report)
    if not found:
        return []
    rows = [
        (f"`{r['case']}`", r["dtype"], name, f"{value:.4g}" if _is_number(value) else str(value))
        for r in found
        for name, value in r["figures"].items()
    ]
    lines = ["## Performance", "", "Apart from correctness; nothing here is scored.", ""]
    return lines + _table(("case", "dtype", "figure", "value"), rows)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _list(title: str, entries: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {_escape(e)}" for e in entries), ""] if entries else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]
    return [*lines, ""]


def _escape(text: str) -> str:
    """One line that Markdown shows as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
