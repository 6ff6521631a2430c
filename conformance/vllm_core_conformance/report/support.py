"""The support matrix of the documentation: backend x area and op x status, from reports.

The same reports give the same bytes. A backend without a report is unverified.

Knows: report.json. Does not know: backends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_core_conformance.outcome import GOOD
from vllm_core_conformance.report.markdown import (
    area_of,
    badge_text,
    describe_devices,
    op_of,
)
from vllm_core_conformance.report.verdict import Report, scored_results

HEAD = """\
# Support matrix

Generated from conformance reports by `vllm-core conformance report --support-matrix`; do not edit.
A cell tells how many of the scored results of that op were right. *unverified*: nobody has shown a
report of this backend, or its hardware was not there.
"""


def support_matrix(reports: Sequence[Report], unverified: Sequence[str] = ()) -> str:
    """Markdown. Of several reports of one backend every one counts, the newest for its facts."""
    by_name: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda r: (r["backend"]["name"], r["date"], r["checksum"])):
        by_name.setdefault(report["backend"]["name"], []).append(report)
    for name in unverified:
        by_name.setdefault(name, [])
    names = sorted(by_name)
    cells = {name: _cells(found) for name, found in by_name.items()}
    rows = sorted({row for found in cells.values() for row in found})
    lines = [HEAD, *_head_table(names, by_name), "", "## By op", ""]
    lines += [f"| area | op | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for row in rows:
        told = [cells[name].get(row, "unverified") for name in names]
        lines.append(f"| {row[0]} | {row[1]} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def _head_table(names: Sequence[str], reports: Mapping[str, Sequence[Report]]) -> list[str]:
    lines = [
        "| backend | version | device | verdict | dtypes | date |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        if not reports[name]:
            lines.append(f"| {name} |  |  | unverified |  |  |")
        for report in reports[name]:
            origin = [report["backend"]["distribution"], report["backend"]["version"]]
            facts = (
                name,
                " ".join(filter(None, origin)),
                describe_devices(report),
                badge_text(report),
                ", ".join(report["dtypes"]),
                report["date"].partition("T")[0],
            )
            lines.append(f"| {' | '.join(facts)} |")
    return lines


def _cells(reports: Sequence[Report]) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        if report["opening"]["status"] == "unverified":
            continue
        for result in scored_results(report):
            found.setdefault((area_of(result["case"]), op_of(result["case"])), []).append(result)
    return {row: _cell(results) for row, results in found.items()}


def _cell(results: Sequence[Mapping[str, Any]]) -> str:
    statuses = [result["status"] for result in results]
    if all(status == "not_supported" for status in statuses):
        return "not supported"
    good = sum(status in GOOD for status in statuses)
    if good < len(statuses):
        return f"**fails** {len(statuses) - good} of {len(statuses)}"
    return f"right ({good})"
