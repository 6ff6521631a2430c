"""A report as one HTML page that needs nothing else: no script, no font, no address.

Knows: report.json, the template. Does not know: where it comes from.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import jinja2

from vllm_core_conformance.outcome import GOOD, STATUSES
from vllm_core_conformance.report.markdown import (
    area_of,
    badge_text,
    describe_backend,
    facts_of,
    failures,
    format_headroom,
    op_of,
    performance,
    repro_command,
)
from vllm_core_conformance.report.verdict import Report, count_statuses, scored_results
from vllm_core_conformance.score import CLASSES


def to_html(report: Report) -> str:
    source = resources.files(__package__).joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page: str = environment.from_string(source).render(
        title=describe_backend(report),
        badge=badge_text(report),
        verdict=report["verdict"],
        facts=facts_of(report),
        statuses=STATUSES,
        counts=[(s, n) for s, n in report["counts"].items() if n],
        matrix=_matrix(report),
        dtypes=report["dtypes"],
        bars=_bars(report),
        declared=report["verdict"]["declared_class"],
        failures=[_failure(report, result) for result in failures(report)],
        compilations=[(op, n) for op, n in report["compilations"].items() if n],
        performance=performance(report),
        capabilities=_capabilities(report),
        checksum=report["checksum"],
        digest=report["cases_digest"],
    )
    return page


def _matrix(report: Report) -> list[dict[str, Any]]:
    """One row per area and op; a cell per dtype."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for result in scored_results(report):
        row = found.setdefault((area_of(result["case"]), op_of(result["case"])), {})
        row.setdefault(result["dtype"], []).append(result)
    return [
        {"area": area, "op": op, "cells": [_cell(row.get(dtype, [])) for dtype in report["dtypes"]]}
        for (area, op), row in found.items()
    ]


def _cell(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What one op is in one dtype: its text and the kind that colours it."""
    counts = count_statuses(results)
    bad = {status: n for status, n in counts.items() if n and status not in GOOD}
    if not results:
        return {"kind": "none", "text": "", "title": "not asked in this dtype"}
    title = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    if bad:
        worst = max(bad, key=lambda status: bad[status])
        text = f"✗ {sum(bad.values())} of {len(results)} {worst.replace('_', ' ')}"
        return {"kind": "unverified" if worst == "unverified" else "bad", "text": text} | {
            "title": title
        }
    if not counts["pass"]:
        return {"kind": "refused", "text": "– not supported", "title": title}
    return {"kind": "good", "text": f"✓ {counts['pass']}", "title": title}


def _bars(report: Report) -> list[dict[str, Any]]:
    """Share of the declared class's limit that the worst error used, largest first."""
    multiplier = CLASSES.get(report["verdict"]["declared_class"], 1.0)
    bars = []
    for entry in sorted(report["headroom"], key=lambda h: -h["load"]):
        share = entry["load"] / multiplier
        bars.append(
            {
                "name": entry["op"],
                "dtype": entry["dtype"],
                "width": f"{min(share, 1.0) * 100:.1f}",
                "share": f"{share * 100:.0f} %",
                "headroom": format_headroom(entry | {"headroom": 1 / share if share else None}),
                "case": entry["case"],
                "over": share > 1.0,
            }
        )
    return bars


def _failure(report: Report, result: dict[str, Any]) -> dict[str, Any]:
    details = {key: value for key, value in result["details"].items() if key != "output"}
    return {
        "case": result["case"],
        "says": report["cases"][result["case"]]["says"],
        "dtype": result["dtype"],
        "seed": result["seed"],
        "status": result["status"],
        "sentence": result["sentence"],
        "repro": repro_command(report, result),
        "details": json.dumps(details, indent=1, ensure_ascii=False) if details else "",
        "output": result["details"].get("output", ""),
        "traceback": result["traceback"],
    }


def _capabilities(report: Report) -> list[tuple[str, str]]:
    return [
        (name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
        for name, value in sorted(report["backend"]["capabilities"].items())
    ]
