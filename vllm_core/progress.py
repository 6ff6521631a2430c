"""Progress bars on stderr for long work, where somebody watches.

Knows: what a bar shows. Does not know: what the work is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_core.engine.output import RequestState


@contextmanager
def load_progress(wanted: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar of bytes; yields report(what, done, total or None)."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


@contextmanager
def request_progress(
    wanted: bool, states: list[RequestState]
) -> Iterator[Callable[[list[RequestState]], None]]:
    """A bar of finished requests with output tokens per second; yields report(changed requests)."""
    if not (wanted and sys.stderr.isatty() and len(states) > 1):
        yield lambda changed: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: tuple[Any, ...] = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=len(states), rate="")
        num_tokens = 0

        def report(changed: list[RequestState]) -> None:
            nonlocal num_tokens
            num_tokens += len(changed)
            elapsed = bar.tasks[0].elapsed or 0.0
            done = sum(1 for state in changed if state.request.is_finished)
            rate = f"{num_tokens / elapsed:.0f} tokens/s" if elapsed > 0 else ""
            bar.update(task, advance=done, rate=rate)

        yield report
