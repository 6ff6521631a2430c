"""`vllm-core`: parses the command line, runs one command, turns errors into exit codes.

Knows: the commands, exit codes. Does not know: what a command does.

Exit codes: 0 done, 1 an error said in one line, 2 wrong usage, 130 interrupted, 141 the reader
of a pipe has gone.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import vllm_core
from vllm_core import log
from vllm_core.cli import bench, chat, doctor, generate, models
from vllm_core.errors import VllmCoreError

COMMANDS = {
    "chat": chat,
    "generate": generate,
    "doctor": doctor,
    "models": models,
    "bench": bench,
}
"""Each has SUMMARY, add_arguments(parser) and run(args) -> exit code."""


def build_parser() -> argparse.ArgumentParser:
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
    for name, command in COMMANDS.items():
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
    args = build_parser().parse_args(argv)
    try:
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


def _one_line(error: VllmCoreError) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
