"""`python -m vllm_core_tpu.compile`: compiles everything, shows a table, holds it to the budgets.

Exit status 1: something does not compile or grew. 2: NOT CHECKED, since libtpu is not here.

Knows: what the options mean. Does not know: compilers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_core_tpu.compile import budgets, configurations, report, targets
from vllm_core_tpu.compile.measure import Facts, measure

KERNELS = "vllm_core_tpu.compile.kernels"
PROGRAMS = "vllm_core_tpu.compile.programs"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    reason = targets.why_not()
    if reason:
        print(f"NOT CHECKED: {reason}", file=sys.stderr)
        return 2
    measured = []
    for target in options.targets:
        for module, work in _work(target, options.quick).items():
            items = [f"{kind}:{step}" for kind, step in work if options.only in f"{kind} {step}"]
            for facts in measure(target, module, items) if items else ():
                measured.append(facts)
                print(_line(facts), flush=True)
    if not measured:
        print(f"nothing is named like {options.only!r}", file=sys.stderr)
        return 1
    versions = targets.versions()
    print(f"table: {report.write(measured, versions, options.output)}")
    if options.update_budgets:
        is_part = options.quick or bool(options.only)
        budgets.save(measured, versions, keep=is_part or options.targets != list(targets.TARGETS))
        return 1 if any("error" in facts for facts in measured) else 0
    return _judge(measured, versions)


def _work(target: str, is_quick: bool) -> dict[str, Sequence[tuple[str, str]]]:
    """By module that compiles it."""
    if is_quick:
        return {KERNELS: configurations.QUICK}
    return {KERNELS: configurations.kernel_work(), PROGRAMS: configurations.model_work(target)}


def _judge(measured: list[Facts], versions: dict[str, str]) -> int:
    allowed, made_with = budgets.load()
    complaints = budgets.complaints(measured, allowed)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if not complaints:
        print(f"{len(measured)} programs compile and none grew by more than 5 %")
        return 0
    if made_with and made_with != versions:
        print(f"the budgets are of {made_with}, this is {versions}", file=sys.stderr)
    print(f"if what grew is worth it: {budgets.UPDATE}", file=sys.stderr)
    return 1


def _line(facts: Facts) -> str:
    where = f"{facts['kind']} {facts['step']} on {facts['target']}"
    if "error" in facts:
        return f"{where}: {facts['error']}"
    return f"{where}: {facts['bundles']} bundles, {facts['spills']} spills, {facts['seconds']} s"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vllm_core_tpu.compile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two configurations per target")
    parser.add_argument("--update-budgets", action="store_true", help="today's figures are allowed")
    parser.add_argument("--only", default="", help="part of a name, as in 'llama-8b decode'")
    parser.add_argument(
        "--targets",
        type=_targets,
        default=list(targets.TARGETS),
        help=f"of {','.join(targets.TARGETS)}; default: all",
    )
    parser.add_argument("--output", type=Path, default=Path("build/compile_tpu"))
    return parser.parse_args(arguments)


def _targets(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in targets.TARGETS]
    if unknown:
        known = ", ".join(targets.TARGETS)
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {known}")
    return names


if __name__ == "__main__":
    sys.exit(main())
