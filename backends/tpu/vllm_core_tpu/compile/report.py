"""The table of what was compiled, for people (Markdown) and for programs (JSON).

Knows: columns. Does not know: compilers, budgets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
HEAD = (
    "configuration", "step", "chip", "bundles", "inner loop", "pages", "queries", "spills",
    "busiest unit", "VMEM KiB", "HBM temp KiB", "code KiB", "compile s",
)  # fmt: skip


def markdown(measured: list[Facts], versions: dict[str, str]) -> str:
    """One row per configuration and chip."""
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    rows = [HEAD, tuple("---" for _ in HEAD), *(_row(facts) for facts in measured)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"# Compiled for TPUs\n\nBy {made_with}, without a TPU: nothing here was run.\n\n"
        "bundles: what the kernel's whole text issues, a cycle each unless the core waits. inner "
        "loop: those of one turn, in which `queries` tokens of all heads meet `pages` blocks. "
        "busiest unit: share of its issue slots that a turn uses. code and HBM: of the layer's "
        f"whole attention with what XLA does around the kernel.\n\n{table}\n"
    )


def _row(facts: Facts) -> tuple[str, ...]:
    who = (facts["kind"], facts["step"], facts["target"])
    if "error" in facts:
        return (*who, facts["error"].replace("|", "/"), *("" for _ in HEAD[4:]))
    return (
        *who,
        *(str(facts.get(x, "")) for x in ("bundles", "turn", "columns", "queries", "spills")),
        _busiest(facts.get("units", {})),
        *(f"{facts[x] / 1024:.0f}" for x in ("vmem", "hbm_temp", "code")),
        f"{facts['seconds']:.1f}",
    )


def _busiest(units: dict[str, float]) -> str:
    if not units:
        return ""
    name = max(units, key=units.__getitem__)
    return f"{name} {100 * units[name]:.0f} %"


def write(measured: list[Facts], versions: dict[str, str], folder: Path) -> Path:
    """table.md and table.json in the folder; -> the former."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"versions": versions, "measured": measured}
    (folder / "table.json").write_text(json.dumps(stored, indent=1) + "\n")
    path = folder / "table.md"
    path.write_text(markdown(measured, versions))
    return path
