"""`vllm-core`: parses the command line, runs one command, turns errors into exit codes.

Knows: the commands, exit codes. Does not know: what a command does, who else brings one.

Exit codes: 0 done, 1 an error said in one line, 2 wrong usage, 130 interrupted, 141 the reader
of a pipe has gone.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import vllm_core
from vllm_core import log
from vllm_core.cli import bench, chat, doctor, generate, models, plugins
from vllm_core.errors import VllmCoreError

COMMANDS = {
    "chat": chat,
    "generate": generate,
    "doctor": doctor,
    "models": models,
    "bench": bench,
}
"""Each has SUMMARY, add_arguments(parser) and run(args) -> exit code. Other distributions bring
more (plugins.py)."""


def build_parser(more: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """Of the core's own commands and of `more`."""
    # Of both the program and each command: `vllm-core --debug chat` and `vllm-core chat --debug`.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )
    parser = argparse.ArgumentParser(
        prog="vllm-core",
        description="Runs large language models on whatever device this machine has.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"vllm-core {vllm_core.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in {**COMMANDS, **(more or {})}.items():
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = argparse.Namespace(debug="--debug" in argv)
    try:
        args = build_parser(_plugin_commands(argv)).parse_args(argv)
        log.configure()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except VllmCoreError as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout at exit and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _plugin_commands(argv: Sequence[str]) -> dict[str, Any]:
    """Those of other distributions, as far as this command line needs them."""
    asked = next((word for word in argv if not word.startswith("-")), None)
    if asked in COMMANDS or "--version" in argv[:1]:
        return {}
    found = plugins.find_commands(COMMANDS)
    if asked in found:
        return {asked: plugins.load_command(found[asked])}
    return {name: plugins.load_for_help(found[name]) for name in sorted(found)}


def _one_line(error: VllmCoreError) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
