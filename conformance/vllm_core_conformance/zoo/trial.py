"""Tries one wrong or honest backend against cases, in this process or, where it is dangerous, under
the supervisor.

Knows: how to run a case, a time limit. Does not know: what a matrix demands.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_core_conformance.case import Case
from vllm_core_conformance.cases import all_cases
from vllm_core_conformance.outcome import GOOD, execute
from vllm_core_conformance.target import Raised, Source, Target
from vllm_core_conformance.tasks import DTYPES
from vllm_core_conformance.zoo.fault import Fault, all_faults
from vllm_core_conformance.zoo.honest import HONEST

RELATED = {
    "attention": ("attention", "kv"),
    "kv": ("kv", "programs", "memory"),
    "programs": ("programs", "deterministic", "contract"),
    "memory": ("memory", "kv", "contract", "weights"),
    "lifecycle": ("contract", "errors", "memory", "weights"),
    "lies": ("contract", "errors", "deterministic", "quantised", "weights"),
    "manifest": ("contract",),
    "trivial": ("attention", "programs", "deterministic"),
    "ops": ("ops",),
    "moe": ("ops",),
    "weights": ("weights", "ops"),
    "quantised": ("quantised", "weights"),
    "stepping": ("stepping", "programs"),
    "sampling": ("sampling",),
    "serving": ("serving", "programs"),
}
"""Area of a fault -> areas of cases that are asked first."""
DANGEROUS_CASES = 4
"""So many cases see a backend that ends or blocks its process."""
CLOSING_CASES = ("memory.close", "contract.two_runtimes")
"""And these, which close a runtime."""
DANGEROUS_SCALE = 0.1
"""Of the usual time limits."""


class TooLate(BaseException):
    """A case took longer than it may. No Exception, so that no backend's handler swallows it."""


@dataclass
class Trial:
    """What the cases said of one backend."""

    name: str
    statuses: dict[str, dict[str, str]] = field(default_factory=dict)
    """case -> dtype -> status, of the cases that ran."""
    sentences: dict[str, str] = field(default_factory=dict)
    """case -> what it said, where it was not good."""
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, case: str, dtype: str, status: str, sentence: str, seconds: float) -> None:
        self.statuses.setdefault(case, {})[dtype] = status
        self.seconds[case] = self.seconds.get(case, 0.0) + seconds
        if status not in GOOD:
            self.sentences.setdefault(case, f"{dtype} {status}: {sentence}")

    def kills(self, expected: Iterable[str]) -> list[str]:
        """Cases that showed one of the expected statuses."""
        wanted = set(expected)
        return [case for case, found in self.statuses.items() if wanted & set(found.values())]

    def with_status(self, status: str) -> list[str]:
        return [case for case, found in self.statuses.items() if status in found.values()]


def related_first(fault: Fault, cases: Sequence[Case]) -> list[Case]:
    """Cases of the fault's own area, then of related ones, then the rest; `serving` last."""
    order = RELATED.get(fault.area, ())

    def place(case: Case) -> int:
        if case.area in order:
            return order.index(case.area)
        return len(order) + (case.area == "serving")

    return sorted(cases, key=place)


def try_fault(name: str, case_ids: Sequence[str], enough: int = 0) -> Trial:
    """One Target per dtype; `enough` kills end it (0: all cases run)."""
    fault, trial = all_faults()[name], Trial(name)
    known = all_cases()
    cases = related_first(fault, [known[case_id] for case_id in case_ids])
    if fault.dangerous:
        return _try_dangerous(fault, cases, trial)
    own = RELATED.get(fault.area, ())
    near = [case for case in cases if case.area in own]
    far = [case for case in cases if case.area not in own]
    targets: dict[str, Target | tuple[str, str]] = {}
    for some in (near, far):
        for dtype in DTYPES:
            for case in some:
                if dtype != DTYPES[0] and not case.every_dtype:
                    continue
                target = _opened(fault, dtype, targets)
                if target is not None:
                    _try_case(case, dtype, target, trial)
                if enough and len(trial.kills(fault.expected)) >= enough:
                    return trial
    return trial


def _opened(
    fault: Fault, dtype: str, targets: dict[str, Target | tuple[str, str]]
) -> Target | tuple[str, str] | None:
    """The runtime in this dtype; why there is none; None where the dtype is not declared."""
    if dtype not in targets:
        first = targets.get(DTYPES[0])
        if isinstance(first, Target) and dtype not in first.caps.dtypes:
            return None
        try:
            with _limited(20.0):
                target = Target(fault.source(), dtype)
            told = f"opened with dtype {dtype}, the runtime says {target.dtype}"
            targets[dtype] = target if target.dtype == dtype else ("capability_lie", told)
        except Raised as raised:
            targets[dtype] = ("fail", str(raised))
        except TooLate:
            targets[dtype] = ("timeout", "opening took too long")
    return targets[dtype]


def _try_case(case: Case, dtype: str, target: Target | tuple[str, str], trial: Trial) -> None:
    if not isinstance(target, Target):
        trial.add(case.id, dtype, *target, 0.0)
        return
    try:
        with _limited(min(case.time_limit, 30.0)):
            result = execute(case, target, seed=0)
    except TooLate:
        trial.add(case.id, dtype, "timeout", "no answer in the time of the case", 30.0)
        return
    trial.add(case.id, dtype, result.status, result.sentence, result.seconds)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TooLate

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _try_dangerous(fault: Fault, cases: Sequence[Case], trial: Trial) -> Trial:
    from vllm_core_conformance.supervisor import Settings, Supervisor
    from vllm_core_conformance.tasks import Task

    settings = Settings(
        f"vllm_core_conformance.zoo.open:{fault.name}", timeout_scale=DANGEROUS_SCALE
    )
    closing = [case for case in cases if case.id in CLOSING_CASES]
    some = [*cases[:DANGEROUS_CASES], *closing]
    tasks = [Task(case, DTYPES[0], 0) for case in some]
    with Supervisor(settings) as supervisor:
        for result in supervisor.run(tasks):
            trial.add(result.case, result.dtype, result.status, result.sentence, result.seconds)
        supervisor.close()
        for at, sentence in enumerate(supervisor.faults):
            status = "timeout" if "no answer" in sentence else "crash"
            trial.add(f"(outside of cases {at})", DTYPES[0], status, sentence, 0.0)
    return trial


def try_honest(
    name: str, dtype: str, case_ids: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, int, str, str]]:
    """(case, seed, status, sentence) of every run of an honest backend in one dtype."""
    known, found = all_cases(), []
    target = Target(Source(name, HONEST[name]), dtype)
    for seed in seeds:
        for case_id in case_ids:
            result = execute(known[case_id], target, seed)
            found.append((case_id, seed, result.status, result.sentence))
    return found
