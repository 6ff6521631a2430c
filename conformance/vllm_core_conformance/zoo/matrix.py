"""Runs the zoo against the cases and prints which case catches which fault.

    vllm-core conformance matrix --quick                 every fault until two cases caught it
    vllm-core conformance matrix --faults 'kv' --json matrix.json
    vllm-core conformance matrix --smoke-worst           the worst faults against `smoke` alone
    vllm-core conformance matrix --honest 10000          randomised cases over honest backends

Gates: every fault is caught by two cases with a status that it is expected to show; every scored
case catches a fault; no case breaks itself on one; no honest backend fails.

Knows: what the matrix demands. Does not know: how a backend is tried.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vllm_core_conformance.case import PROFILES, Case
from vllm_core_conformance.cases import all_cases, select
from vllm_core_conformance.outcome import GOOD
from vllm_core_conformance.zoo.fault import Fault, all_faults, select_faults
from vllm_core_conformance.zoo.honest import HONEST, dtypes_of
from vllm_core_conformance.zoo.trial import RELATED, Trial, try_fault, try_honest

ENOUGH = 2
"""Cases that must catch a fault."""
DEFAULT_PROFILES = tuple(name for name in PROFILES if name != "performance")
TASKS_PER_WORKER = 20
"""Faults leak: a worker is replaced after so many."""
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default=",".join(DEFAULT_PROFILES),
        metavar="NAMES",
        help="cases of these profiles, with commas (default: all but performance)",
    )
    parser.add_argument(
        "--faults", default="*", metavar="GLOBS", help="names or areas of faults, with commas"
    )
    parser.add_argument(
        "--cases", default="*", metavar="GLOB", help="of the profiles' cases only these"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"stop a fault at {ENOUGH} cases that caught it"
    )
    parser.add_argument(
        "--smoke-worst",
        action="store_true",
        help="only the worst faults, against the cases of the profile smoke",
    )
    parser.add_argument(
        "--honest",
        type=int,
        default=0,
        metavar="N",
        help="instead of faults: N randomised cases over honest backends, none of which may fail",
    )
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--json", default=None, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--verbose", action="store_true", help="what each case said")


def run(args: argparse.Namespace) -> int:
    """0 when every gate holds, else 1."""
    cases = [case for case in _cases(args) if case.scored]
    if args.honest:
        return _honest(args, cases)
    worst_only = bool(args.smoke_worst)
    faults = [
        fault for fault in select_faults(args.faults.split(",")) if fault.worst or not worst_only
    ]
    enough = 1 if worst_only else ENOUGH
    ids = [case.id for case in cases]
    calls = [(fault.name, (fault.name, ids, enough if args.quick else 0)) for fault in faults]
    trials = _in_processes(try_fault, calls, args.jobs, lambda t: _progress_of(t, worst_only))
    matrix = Matrix({fault.name: fault for fault in faults}, cases, trials, enough)
    whole = args.faults == "*" and args.cases == "*" and not worst_only
    if args.quick and whole:
        _look_for_kills(matrix, args.jobs)
    matrix.print(verbose=args.verbose)
    problems = matrix.problems(demand_of_cases=whole)
    if args.json:
        Path(args.json).write_text(json.dumps(matrix.plain() | {"problems": problems}, indent=1))
    return _verdict(problems)


def _cases(args: argparse.Namespace) -> list[Case]:
    from fnmatch import fnmatchcase

    profiles = ("smoke",) if args.smoke_worst else args.profile.split(",")
    return [case for case in select(profiles) if fnmatchcase(case.id, args.cases)]


def _verdict(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"NOT MET: {problem}")
    print("every gate holds" if not problems else f"{len(problems)} gates do not hold")
    return 1 if problems else 0


# ---------------------------------------------------------------- the matrix
@dataclass
class Matrix:
    """Faults by cases."""

    faults: dict[str, Fault]
    cases: list[Case]
    trials: dict[str, Trial]
    enough: int = ENOUGH
    found: dict[str, list[str]] = field(default_factory=dict)
    """case -> faults that it was found to catch when it was asked alone."""

    def kills(self, name: str) -> list[str]:
        trial = self.trials.get(name)
        return trial.kills(self.faults[name].expected) if trial else []

    def by_case(self) -> dict[str, list[str]]:
        caught: dict[str, list[str]] = {case.id: [] for case in self.cases}
        for name in self.faults:
            for case in self.kills(name):
                caught.setdefault(case, []).append(name)
        for case, names in self.found.items():
            caught[case] = sorted({*caught[case], *names})
        return caught

    def problems(self, demand_of_cases: bool) -> list[str]:
        """One sentence per gate that does not hold."""
        said = []
        for name, fault in self.faults.items():
            killers = self.kills(name)
            if len(killers) < self.enough:
                others = self._others(name)
                said.append(
                    f"{name} ({fault.says}) is caught by {len(killers)} of {self.enough} cases"
                    + (f": {', '.join(killers)}" if killers else "")
                    + (f"; unexpected: {others}" if others else "")
                )
            broken = self.trials[name].with_status("harness_error") if name in self.trials else []
            said += [
                f"{case} broke itself on {name}: {self.trials[name].sentences[case]}"
                for case in broken
            ]
        if demand_of_cases:
            caught = self.by_case()
            said += [f"{case.id} catches no fault" for case in self.cases if not caught[case.id]]
        return said

    def _others(self, name: str) -> str:
        trial = self.trials.get(name)
        if trial is None:
            return "the process that tried it died"
        expected = {*self.faults[name].expected, *GOOD}
        return "; ".join(
            f"{case} {status}"
            for case, found in trial.statuses.items()
            for status in found.values()
            if status not in expected
        )[:300]

    def print(self, verbose: bool = False) -> None:
        for name, fault in self.faults.items():
            killers = self.kills(name)
            mark = "*" if fault.worst else " "
            print(f"{mark}{name:34} {fault.area:10} {len(killers):3}  {_few(killers)}")
            if verbose and name in self.trials:
                for case, sentence in self.trials[name].sentences.items():
                    print(f"      {case}: {sentence[:240]}")
        print()
        for case, names in self.by_case().items():
            print(f" {case:44} {len(names):3}  {_few(names)}")
        caught = sum(len(self.kills(name)) >= self.enough for name in self.faults)
        print(f"\n{caught} of {len(self.faults)} faults are caught by {self.enough} cases or more")

    def plain(self) -> dict[str, Any]:
        return {
            "faults": {
                name: {
                    "area": fault.area,
                    "says": fault.says,
                    "worst": fault.worst,
                    "expected": sorted(fault.expected),
                    "kills": self.kills(name),
                    "statuses": self.trials[name].statuses if name in self.trials else {},
                    "sentences": self.trials[name].sentences if name in self.trials else {},
                }
                for name, fault in self.faults.items()
            },
            "cases": self.by_case(),
        }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")


def _look_for_kills(matrix: Matrix, jobs: int) -> None:
    """After a quick run: cases that caught nothing yet meet the faults that they did not see."""
    idle = [case for case, names in matrix.by_case().items() if not names and case in all_cases()]
    calls = [(case, (case, _likely(case, matrix))) for case in idle]
    for case, names in _in_processes(
        first_kill, calls, jobs, lambda found: f"{len(found)} kill"
    ).items():
        matrix.found[case] = names


def _likely(case_id: str, matrix: Matrix) -> list[str]:
    """Faults that this case did not meet yet, those of related areas first."""
    area = all_cases()[case_id].area

    def place(fault: Fault) -> int:
        order = RELATED.get(fault.area, ())
        return order.index(area) if area in order else len(order) + 10

    unseen = [
        fault
        for name, fault in matrix.faults.items()
        if not fault.dangerous and case_id not in matrix.trials.get(name, Trial(name)).statuses
    ]
    return [fault.name for fault in sorted(unseen, key=place)]


def first_kill(case_id: str, names: Sequence[str]) -> list[str]:
    """The first fault that this case alone catches."""
    for name in names:
        if try_fault(name, [case_id]).kills(all_faults()[name].expected):
            return [name]
    return []


# ---------------------------------------------------------------- honest backends
def _honest(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    """N runs: each honest backend in each dtype, seed after seed."""
    ids = [case.id for case in cases]
    every = [case.id for case in cases if case.every_dtype]
    combos = [(name, dtype) for name in HONEST for dtype in dtypes_of(name)]
    first = {name: dtypes_of(name)[0] for name in HONEST}
    per_seed = sum(len(ids if first[name] == dtype else every) for name, dtype in combos)
    num_seeds = max(1, -(-args.honest // max(1, per_seed)))
    begin = time.monotonic()
    calls = [
        (
            f"{name} {dtype} {part}",
            (name, dtype, ids if first[name] == dtype else every, seeds),
        )
        for name, dtype in combos
        for part, seeds in enumerate(_parts(range(1, num_seeds + 1), 10))
    ]
    results = _in_processes(try_honest, calls, args.jobs, _alarms_of)
    count, alarms = 0, []
    for call, found in results.items():
        count += len(found)
        alarms += [
            f"{call.rpartition(' ')[0]}: {case} --seed {seed}: {status}: {sentence}"
            for case, seed, status, sentence in found
            if status not in GOOD
        ]
    missing = [f"{name}: its process died" for name, _ in calls if name not in results]
    print(
        f"{count} runs of {len(ids)} cases over {len(HONEST)} honest backends "
        f"({len(combos)} with dtypes), {num_seeds} seeds: {len(alarms)} false alarms, "
        f"{time.monotonic() - begin:.0f} s"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"runs": count, "alarms": alarms}, indent=1))
    return _verdict([*alarms, *missing])


def _alarms_of(found: Sequence[tuple[str, int, str, str]]) -> str:
    alarms = [
        f"\n    {case} --seed {seed}: {s}: {t}" for case, seed, s, t in found if s not in GOOD
    ]
    return f"{len(found)} runs, {len(alarms)} false alarms" + "".join(alarms)


def _parts(seeds: range, size: int) -> list[range]:
    return [seeds[i : i + size] for i in range(0, len(seeds), size)]


# ---------------------------------------------------------------- processes
def _in_processes(
    function: Callable[..., T],
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    jobs: int,
    told: Callable[[T], str],
) -> dict[str, T]:
    """name -> result, in the order of the calls. What breaks the pool runs again alone; what breaks
    that too is left out."""
    found: dict[str, T] = {}
    size = jobs * TASKS_PER_WORKER
    for at in range(0, len(calls), size):
        for call in _round(function, calls[at : at + size], jobs, told, found):
            _round(function, [call], 1, told, found)
    return {name: found[name] for name, _ in calls if name in found}


def _round(
    function: Callable[..., T],
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    jobs: int,
    told: Callable[[T], str],
    found: dict[str, T],
) -> list[tuple[str, tuple[Any, ...]]]:
    """-> the calls that a dead worker left without a result."""
    context = multiprocessing.get_context("spawn")
    # not max_tasks_per_child, with which CPython 3.11 waits for ever (gh-115634)
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(function, *arguments): name for name, arguments in calls}
        for future in as_completed(futures):
            try:
                found[futures[future]] = future.result()
            except BrokenProcessPool:
                continue
            except Exception as error:  # of the suite: the rest shall be told all the same
                print(f"{futures[future]}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            said = f"{futures[future]}: {told(future.result())}"
            print(f"[{len(found):4}] {said}", file=sys.stderr, flush=True)
    return [call for call in calls if call[0] not in found]


def _progress_of(trial: Trial, worst_only: bool) -> str:
    killers = trial.kills(all_faults()[trial.name].expected)
    return f"{len(killers)} of {len(trial.statuses)} cases" + (
        "" if killers or not worst_only else "  MISSED"
    )


def main() -> int:
    """`python -m vllm_core_conformance.zoo.matrix`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
