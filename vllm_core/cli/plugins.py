"""Commands that other distributions bring: entry points of the group `vllm_core.commands`.

Each names a module with SUMMARY, add_arguments(parser) and run(args) -> exit code, which imports
nothing heavy before it runs. It is loaded when it is asked for, or for --help; a broken one says so
in its own line and never hides the others.

Knows: entry points. Does not know: what a command does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_core.errors import BackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "vllm_core.commands"


@dataclass(frozen=True)
class Command:
    """What main needs of a command; an own command is a module with the same names."""

    SUMMARY: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    __doc__: str | None = None


def find_commands(taken: Collection[str]) -> dict[str, EntryPoint]:
    """By name, not loaded; a name of the core's own, or of an earlier one, stays with it."""
    from importlib.metadata import entry_points  # milliseconds that few command lines need

    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in taken:
            found.setdefault(entry.name, entry)
    return found


def load_command(entry: EntryPoint) -> Command:
    """BackendError in one line when it is broken."""
    try:
        found = _summarised(entry)
        found.add_arguments(argparse.ArgumentParser(add_help=False))  # it may be broken too
        return found
    except (Exception, SystemExit) as error:
        origin = getattr(entry.dist, "name", None) or entry.value
        raise BackendError(
            f"the command {entry.name!r} of {origin} cannot be loaded: {_one_line(error)}; "
            f"reinstall {origin}, or remove it"
        ) from error


def load_for_help(entry: EntryPoint) -> Command:
    """Its summary, without its arguments; or a line that says why it is broken."""
    try:
        summary = _summarised(entry).SUMMARY
    except (Exception, SystemExit) as error:
        summary = f"broken: {_one_line(error)}".replace("%", "%%")
    return Command(summary, lambda parser: None, lambda args: 1)


def _summarised(entry: EntryPoint) -> Command:
    module = entry.load()
    if not isinstance(module.SUMMARY, str):
        raise TypeError(f"SUMMARY is {type(module.SUMMARY).__name__}, not text")
    return Command(module.SUMMARY, module.add_arguments, module.run, module.__doc__)


def _one_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
