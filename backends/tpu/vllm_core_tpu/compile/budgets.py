"""What each configuration may cost, as data beside this module: a kernel that grows is noticed.

Knows: figures of today and of then. Does not know: where figures come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("budgets.json")
TOLERANCE = 0.05
FIGURES = {
    "bundles": "bundles",
    "turn": "bundles of the inner loop",
    "spills": "spills",
    "vmem": "bytes of VMEM",
    "code": "bytes of code",
    "hbm_temp": "temporary bytes of HBM",
}
"""What is held to a budget, and how it is called."""
UPDATE = "nox -s compile_tpu -- --update-budgets"

Facts = dict[str, Any]
Budgets = dict[str, dict[str, dict[str, int]]]
"""{configuration: {target: {figure: most}}}"""


def load(path: Path = FILE) -> tuple[Budgets, dict[str, str]]:
    """(budgets, versions that they were made with)."""
    if not path.exists():
        return {}, {}
    stored = json.loads(path.read_text())
    return stored["budgets"], stored["versions"]


def save(
    measured: list[Facts], versions: dict[str, str], path: Path = FILE, keep: bool = False
) -> None:
    """Today's figures as the budgets; `keep`: beside those of what was not measured."""
    budgets: Budgets = load(path)[0] if keep else {}
    for facts in measured:
        if "error" not in facts:
            of_target = budgets.setdefault(name_of(facts), {})
            of_target[facts["target"]] = {figure: facts[figure] for figure in FIGURES}
    lines = []
    for name in sorted(budgets):
        of_targets = ",\n".join(
            f"      {json.dumps(target)}: {json.dumps(budgets[name][target])}"
            for target in sorted(budgets[name])
        )
        lines.append(f"    {json.dumps(name)}: {{\n{of_targets}\n    }}")
    body = ",\n".join(lines)
    path.write_text(
        f'{{\n  "versions": {json.dumps(versions)},\n  "budgets": {{\n{body}\n  }}\n}}\n'
    )


def name_of(facts: Facts) -> str:
    return f"{facts['kind']} {facts['step']}"


def complaints(measured: list[Facts], budgets: Budgets) -> list[str]:
    """A sentence for each figure that grew beyond TOLERANCE, each error, each missing budget."""
    found = []
    for facts in measured:
        where = f"{name_of(facts)} on {facts['target']}"
        if "error" in facts:
            found.append(f"{where}: {facts['error']}")
            continue
        budget = budgets.get(name_of(facts), {}).get(facts["target"])
        if budget is None:
            found.append(f"{where}: there is no budget; `{UPDATE}` makes one")
            continue
        found += [
            f"{where}: {called} grew from {_growth(budget[figure], facts[figure])}"
            for figure, called in FIGURES.items()
            if facts[figure] > budget[figure] * (1 + TOLERANCE)
        ]
    return found


def _growth(before: int, now: int) -> str:
    percent = f" (+{100 * (now - before) / before:.0f} %)" if before else ""
    return f"{before} to {now}{percent}"
