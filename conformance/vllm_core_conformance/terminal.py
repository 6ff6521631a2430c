"""What a run shows: progress, failures as they come, the closing tables.

Knows: rich, report.json. Does not know: how cases run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_core_conformance.outcome import GOOD, STATUSES, Result
from vllm_core_conformance.report.markdown import (
    badge_text,
    counts_by_area,
    describe_backend,
    describe_devices,
    failures,
    format_headroom,
    performance,
    repro_command,
)
from vllm_core_conformance.report.verdict import MAX_KEYS, Report
from vllm_core_conformance.supervisor import Description
from vllm_core_conformance.tasks import Task

COLOURS = {"pass": "green", "not_supported": "cyan", "unverified": "yellow"}
NUM_SLOWEST = 5
MAX_SHOWN = 20
"""Failures with a command of their own at the end."""


class Screen:
    """Use as a context around the run."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        self._console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("opening the backend", total=None)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(escape(text))

    def plan(self, description: Description, tasks: Sequence[Task]) -> None:
        if description.status != "ok":
            self.say(description.sentence)
        dtypes = ", ".join(dict.fromkeys(task.dtype for task in tasks))
        num_cases = len({task.case.id for task in tasks})
        self.say(f"{num_cases} cases, {len(tasks)} results to come, in {dtypes}")
        self._progress.update(self._bar, description="cases", total=len(tasks))

    def result(self, task: Task, result: Result) -> None:
        self._progress.update(self._bar, advance=1, description=escape(task.case.id))
        if result.status in GOOD:
            return
        colour = "yellow" if not task.case.scored else COLOURS.get(result.status, "red")
        mark = "" if task.case.scored else ", unscored"
        head = f"{task.case.id} ({task.dtype}, seed {task.seed}{mark})"
        self._console.print(f"[bold {colour}]{escape(head)}: {result.status}[/]")
        self._console.print(f"    {escape(result.sentence)}")

    # ---- the end
    def close_with(self, report: Report) -> None:
        """Tables and verdict."""
        self._areas(report)
        self._headroom(report)
        self._compilations(report)
        self._performance(report)
        self._slowest(report)
        self._repro(report)
        self._verdict(report)

    def _areas(self, report: Report) -> None:
        by_area = counts_by_area(report)
        if not by_area:
            return
        used = [s for s in STATUSES if any(counts[s] for counts in by_area.values())]
        table = _table("area", *used)
        for area, counts in by_area.items():
            table.add_row(area, *(_count(status, counts[status]) for status in used))
        total = {s: sum(counts[s] for counts in by_area.values()) for s in used}
        table.add_section()
        table.add_row("all", *(_count(status, total[status]) for status in used))
        self._console.print(table)

    def _headroom(self, report: Report) -> None:
        if not report["headroom"]:
            return
        table = _table("op", "dtype", "headroom", "worst case")
        table.columns[3].justify = "left"
        for entry in sorted(report["headroom"], key=lambda h: -float(h["load"])):
            told = [entry["op"], entry["dtype"], format_headroom(entry), entry["case"]]
            table.add_row(*map(escape, told))
        self._console.print(table)

    def _compilations(self, report: Report) -> None:
        counts = {op: n for op, n in report["compilations"].items() if n}
        if counts:
            told = ", ".join(f"{op} {n}" for op, n in sorted(counts.items(), key=lambda c: -c[1]))
            self.say(f"programs compiled per op (at most {MAX_KEYS}): {told}")

    def _performance(self, report: Report) -> None:
        for result in performance(report):
            told = ", ".join(f"{name} {_figure(v)}" for name, v in result["figures"].items())
            self.say(f"performance, not scored: {result['case']} ({result['dtype']}): {told}")

    def _slowest(self, report: Report) -> None:
        slowest = sorted(report["results"], key=lambda r: -float(r["seconds"]))[:NUM_SLOWEST]
        told = ", ".join(f"{r['case']} ({r['dtype']}) {r['seconds']:.2f} s" for r in slowest)
        if told:
            self.say(f"slowest: {told}")

    def _repro(self, report: Report) -> None:
        bad = [] if report["opening"]["status"] != "ok" else failures(report)
        for result in bad[:MAX_SHOWN]:
            self.say(repro_command(report, result))
        if len(bad) > MAX_SHOWN:
            self.say(f"... and {len(bad) - MAX_SHOWN} more failures")

    def _verdict(self, report: Report) -> None:
        verdict = report["verdict"]
        good = verdict["status"] in ("passed", "unscored")
        colour = "green" if good else "yellow" if verdict["status"] == "unverified" else "red"
        for reason in verdict["reasons"]:
            self.say(f"  {reason}")
        for hint in verdict["hints"]:
            self.say(f"  hint: {hint}")
        where = f"{describe_backend(report)} on {describe_devices(report)}"
        grade = verdict["class"] or "not measured"
        self._console.print(
            f"[bold {colour}]{verdict['status']}[/]: {escape(badge_text(report))} · "
            f"{escape(where)} · class {grade}, declared {verdict['declared_class']} · "
            f"{report['seconds']:.1f} s"
        )


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(names):
        table.add_column(name.replace("_", " "), justify="left" if at == 0 else "right")
    return table


def _count(status: str, count: int) -> str:
    return f"[{COLOURS.get(status, 'red')}]{count}[/]" if count else "[dim]0[/]"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
