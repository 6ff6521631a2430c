"""Measurements as JSON, so that figures can be compared between versions and machines."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vllm_core
from vllm_core.cli import (
    bench_growth,
    bench_host,
    bench_latency,
    bench_memory,
    bench_quality,
    bench_throughput,
    bench_transformers,
)
from vllm_core.errors import InvalidArgument

SUMMARY = "measure throughput, latency, memory, its growth, the host's own cost, quality of weights"

BENCHMARKS = {
    "throughput": bench_throughput,
    "latency": bench_latency,
    "memory": bench_memory,
    "host": bench_host,
    "growth": bench_growth,
    "quality": bench_quality,
    "transformers": bench_transformers,
}
"""Each has SUMMARY, add_arguments(parser) and measure(args) -> plain data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        sub = benchmarks.add_parser(name, help=benchmark.SUMMARY, description=benchmark.__doc__)
        sub.add_argument(
            "--output", type=Path, metavar="FILE", help="write the JSON there (default: stdout)"
        )
        benchmark.add_arguments(sub)
        sub.set_defaults(measure=benchmark.measure)


def run(args: argparse.Namespace) -> int:
    if args.output is not None:
        _check_output(args.output)  # before minutes of work whose result could not be kept
    measured: Mapping[str, Any] = args.measure(args)
    report = {
        "benchmark": args.benchmark,
        "vllm_core": vllm_core.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **measured,
    }
    text = json.dumps(report, indent=2)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n", "utf-8")
        print(f"written to {args.output}", file=sys.stderr)
    return 0


def _check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise InvalidArgument(f"--output: there is no folder {path.parent}")
    try:
        path.open("a").close()
    except OSError as error:
        raise InvalidArgument(f"--output {path} cannot be written: {error.strerror}") from error
