"""Writes a new backend for vllm-core as a complete distribution that passes the suite at once.

    vllm-core new-backend acme --framework torch

makes the folder vllm-core-acme: entry point, runtime, ops, the table of who computes what, a
conformance test, a CI job, a README. Everything runs on portable ops on the CPU until you
replace it, one op at a time.

Knows: the command's arguments, what to do next. Does not know: the files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "a new backend as a complete distribution that passes the suite at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vllm_core_conformance.kit.distribution import FRAMEWORKS  # heavy: not for a summary

    parser.add_argument("name", help="of the backend: small letters, digits, underscores")
    parser.add_argument(
        "--framework",
        required=True,
        choices=sorted(FRAMEWORKS),
        help="; ".join(f"{name}: {one.says}" for name, one in FRAMEWORKS.items()),
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to make; by default vllm-core-NAME in the current one",
    )


def run(args: argparse.Namespace) -> int:
    from vllm_core_conformance.kit.distribution import check_name, count_lines, render, write

    check_name(args.name)
    distribution = f"vllm-core-{args.name.replace('_', '-')}"
    folder = args.output if args.output is not None else Path(distribution)
    files = render(args.name, args.framework)
    write(files, folder)
    for path in files:
        print(folder / path)
    own, kernel = count_lines(files)
    beside = f" and {kernel} of kernels to replace" if kernel else ""
    print(f"\n{own} lines of Python that are yours{beside}. Next:\n")
    print(f"  cd {folder}")
    print("  pip install -e '.[test]'")
    print("  vllm-core doctor")
    print(f"  vllm-core conformance run --backend {args.name} --profile contract,core")
    print(f"  vllm-core generate --backend {args.name} 'The capital of France is'")
    print(f"  python -m vllm_core_{args.name}.providers")
    return 0
