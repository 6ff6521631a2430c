"""Judges a backend: is it right, in which numeric class, and if not, what is wrong.

    vllm-core conformance run --backend acme                      the profile `core`
    vllm-core conformance run --backend acme --profile core,serving --jobs 2 --output reports
    vllm-core conformance run --backend acme_lab.open:runtime --case 'attention.*' --dtype bfloat16
    vllm-core conformance list --profile smoke
    vllm-core conformance repro attention.coded.decode --backend acme --seed 3 --dtype float16
    vllm-core conformance report reports --format md
    vllm-core conformance report --verify reports/report.json

--backend is a name that `vllm-core doctor` lists, or module:function, an open function
(OpenConfig) -> Runtime of a backend under development. The backend runs in processes of its own.

Exit codes: 0 passed, 1 not passed, 2 wrong usage, 3 unverified (no device), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SUMMARY = "judge a backend: run the conformance suite, reproduce failures, make reports"
FORMATS = ("md", "json", "html", "badge")


class _LazyParser(argparse.ArgumentParser):
    """Asks for its arguments when they are needed, so that the others need not import it."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def _filled(self) -> None:
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._filled()
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_LazyParser
    )
    for name, (summary, add, action) in ACTIONS.items():
        sub = actions.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.", formatter_class=raw
        )
        add(sub)
        sub.set_defaults(act=action)
    matrix = actions.add_parser(
        "matrix",
        help="run the zoo of wrong backends and print which case catches which fault",
        formatter_class=raw,
    )
    matrix.fill = _fill_matrix


def run(args: argparse.Namespace) -> int:
    from vllm_core_conformance.report.build import BadReport
    from vllm_core_conformance.tasks import BadRequest

    try:
        code: int = args.act(args)
        return code
    except (BadRequest, BadReport) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# ---- run
def _add_selection(parser: argparse.ArgumentParser, profile: str | None) -> None:
    parser.add_argument(
        "--profile",
        default=profile,
        metavar="NAMES",
        help="smoke, contract, core, serving, deterministic, quantised, distributed, performance; "
        f"several with commas (default: {profile or 'all'})",
    )
    parser.add_argument("--case", metavar="GLOB", help="only the cases whose id matches")


def _add_backend(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--backend", required=required, metavar="X", help="a name, or module:function"
    )
    parser.add_argument("--suite", default=None, help=argparse.SUPPRESS)  # other cases: its tests
    parser.add_argument(
        "--timeout-scale",
        type=_positive_float,
        default=1.0,
        metavar="F",
        help="multiplies every time limit, for slow devices and simulators",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_backend(parser)
    _add_selection(parser, "core")
    parser.add_argument(
        "--dtype", metavar="NAMES", help="only in these dtypes; several with commas"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: 0")
    parser.add_argument(
        "--repeat", type=_positive, default=1, metavar="K", help="run with K seeds, from S on"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="worker processes (default: 1)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write report.json, report.md, report.html and badge.svg there",
    )
    parser.add_argument("--json", action="store_true", help="print report.json")
    parser.add_argument("--fail-fast", action="store_true", help="end at the first failure")


def _run(args: argparse.Namespace) -> int:
    from vllm_core_conformance.report.build import dump
    from vllm_core_conformance.running import exit_code, run_conformance
    from vllm_core_conformance.supervisor import CASES, Settings
    from vllm_core_conformance.tasks import Wanted, parse_profiles
    from vllm_core_conformance.terminal import Screen

    if args.output is not None:
        _check_folder(args.output)  # before minutes of work whose result could not be kept
    wanted = Wanted(
        parse_profiles(args.profile), args.case, _names(args.dtype), args.seed, args.repeat
    )
    settings = Settings(
        args.backend,
        jobs=args.jobs,
        timeout_scale=args.timeout_scale,
        cases=args.suite or CASES,
    )
    with Screen(to_stderr=args.json) as screen:
        report = run_conformance(
            wanted,
            settings,
            on_plan=screen.plan,
            on_result=screen.result,
            fail_fast=args.fail_fast,
        )
    screen.close_with(report)
    if args.json:
        print(dump(report), end="")
    if args.output is not None:
        _write_all(report, args.output)
        screen.say(f"written: {args.output}/report.json, report.md, report.html, badge.svg")
    return exit_code(report)


def _check_folder(folder: Path) -> None:
    from vllm_core_conformance.tasks import BadRequest

    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "report.json"
        probe.open("a").close()
        if not probe.stat().st_size:
            probe.unlink()
    except OSError as error:
        raise BadRequest(f"--output {folder} cannot be written: {error.strerror}") from error


def _write_all(report: dict[str, Any], folder: Path) -> None:
    names = {"json": "report.json", "md": "report.md", "html": "report.html", "badge": "badge.svg"}
    for kind, name in names.items():
        (folder / name).write_text(_render(report, kind), "utf-8")


def _render(report: dict[str, Any], kind: str) -> str:
    from vllm_core_conformance.report.badge import to_badge
    from vllm_core_conformance.report.build import dump
    from vllm_core_conformance.report.html import to_html
    from vllm_core_conformance.report.markdown import to_markdown

    return {"json": dump, "md": to_markdown, "html": to_html, "badge": to_badge}[kind](report)


# ---- list
def _add_list(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser, None)
    _add_backend(parser, required=False)
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def _list(args: argparse.Namespace) -> int:
    from vllm_core_conformance.listing import list_cases

    return list_cases(args)


# ---- repro
def _add_repro(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", metavar="CASE", help="its id, as reports name it")
    _add_backend(parser)
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: 0")
    parser.add_argument("--dtype", default="auto", metavar="D", help="default: the backend's own")
    parser.add_argument(
        "--write-script",
        type=Path,
        metavar="FILE",
        help="also write a standalone script that does it in one process, for a debugger",
    )


def _repro(args: argparse.Namespace) -> int:
    from vllm_core_conformance.repro import reproduce

    return reproduce(args)


# ---- report
def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT", help="report.json, or a folder with it"
    )
    parser.add_argument("--format", choices=FORMATS, default="md", help="default: md")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there (default: stdout)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify",
        action="store_true",
        help="check checksum, counts, verdict and that no required case is missing",
    )
    what.add_argument(
        "--support-matrix",
        action="store_true",
        help="one table of all the reports, backend by op, for docs/support.md",
    )
    parser.add_argument(
        "--unverified",
        default="",
        metavar="NAMES",
        help="with --support-matrix: backends to name although there is no report of them",
    )


def _report(args: argparse.Namespace) -> int:
    from vllm_core_conformance.report.build import read_report
    from vllm_core_conformance.report.support import support_matrix

    if args.verify:
        return max(_verify(path) for path in args.reports)
    reports = [read_report(path) for path in args.reports]
    if args.support_matrix:
        text = support_matrix(reports, _names(args.unverified))
    else:
        text = "\n".join(_render(report, args.format) for report in reports)
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, "utf-8")
    return 0


def _verify(path: Path) -> int:
    from vllm_core_conformance.report.build import read_report
    from vllm_core_conformance.report.markdown import badge_text
    from vllm_core_conformance.report.verify import verify
    from vllm_core_conformance.running import cases_of
    from vllm_core_conformance.supervisor import CASES

    report = read_report(path)
    wrong, unknown = verify(report, cases_of(CASES))
    for sentence in wrong:
        print(f"{path}: wrong: {sentence}")
    for sentence in unknown:
        print(f"{path}: not checked: {sentence}")
    if not wrong:
        print(f"{path}: consistent, {badge_text(report)}")
    return 1 if wrong else 0


# ---- matrix
def _fill_matrix(parser: argparse.ArgumentParser) -> None:
    matrix = importlib.import_module("vllm_core_conformance.zoo.matrix")
    matrix.add_arguments(parser)
    parser.set_defaults(act=matrix.run)


# ---- arguments
def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n.strip() for n in (text or "").split(",") if n.strip()))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _seed(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return number


def _positive_float(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return number


Add = Callable[[argparse.ArgumentParser], None]
Action = Callable[[argparse.Namespace], int]

ACTIONS: dict[str, tuple[str, Add, Action]] = {
    "run": ("run the cases of a profile and judge the backend", _add_run, _run),
    "list": ("name the cases and what each demands", _add_list, _list),
    "repro": ("run one case alone, with everything that is known of it", _add_repro, _repro),
    "report": ("draw a report in another form, or verify it", _add_report, _report),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Without the core's command line: `python -m vllm_core_conformance.cli run ...`."""
    parser = argparse.ArgumentParser(
        prog="vllm-core conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
