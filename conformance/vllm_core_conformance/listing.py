"""`vllm-core conformance list`: the cases, and what a backend would be asked.

Knows: cases, tables. Does not know: results.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_core_conformance.case import PROFILES, Case
from vllm_core_conformance.running import cases_of
from vllm_core_conformance.supervisor import CASES, Description, Settings, Supervisor
from vllm_core_conformance.tasks import (
    BadRequest,
    Wanted,
    dtypes_of,
    parse_profiles,
    select_cases,
)


def list_cases(args: argparse.Namespace) -> int:
    profiles = parse_profiles(args.profile) if args.profile else tuple(PROFILES)
    chosen = select_cases(cases_of(args.suite or CASES), Wanted(profiles, args.case))
    description = _describe(args) if args.backend else None
    rows = [_row(case, description) for case in chosen]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        marks = "" if row["scored"] else " (unscored)"
        print(f"{row['case']}  [{', '.join(row['profiles'])}]{marks}")
        print(f"    {row['says']}")
        if row.get("dtypes"):
            print(f"    runs in {', '.join(row['dtypes'])}")
        if row["needs"]:
            print(f"    may be refused without {', '.join(row['needs'])}")
    print(f"{len(rows)} cases, {sum(row['scored'] for row in rows)} of them scored")
    return 0


def _describe(args: argparse.Namespace) -> Description:
    with Supervisor(Settings(args.backend, timeout_scale=args.timeout_scale)) as supervisor:
        description = supervisor.describe()
    if description.status != "ok":
        raise BadRequest(f"the backend cannot be opened: {description.sentence}")
    return description


def _row(case: Case, description: Description | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": case.id,
        "profiles": [name for name in PROFILES if name in case.profiles],
        "scored": case.scored,
        "needs": list(case.needs),
        "says": case.says,
    }
    if description is not None:
        facts = description.facts
        row["dtypes"] = dtypes_of(case, facts["capabilities"], facts["dtype"])
    return row
