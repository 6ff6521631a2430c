"""What a run has to do: which cases of which profiles, in which dtypes, with which seeds.

Knows: cases, what a backend declares. Does not know: processes, results.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_core_conformance.case import PROFILES, Case

DTYPES = ("float32", "bfloat16", "float16")
"""Those in which a case of every dtype runs, as far as they are declared."""
UNKNOWN_DTYPE = "unknown"
"""Of a backend that never got to say what it computes in."""


@dataclass(frozen=True)
class Task:
    """One case, in one dtype, with one seed."""

    case: Case
    dtype: str
    seed: int

    @property
    def name(self) -> tuple[str, str, int]:
        return self.case.id, self.dtype, self.seed


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for."""

    profiles: tuple[str, ...] = ("core",)
    cases: str | None = None
    """A glob over ids; None: all of the profiles."""
    dtypes: tuple[str, ...] = ()
    """Empty: those that the case and the backend have."""
    seed: int = 0
    repeat: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether it asks for everything that its profiles require."""
        return self.cases is None and not self.dtypes

    @property
    def seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.repeat))


class BadRequest(Exception):
    """The caller asked for what does not exist; one sentence."""


def parse_profiles(text: str) -> tuple[str, ...]:
    """ "core,serving" -> names, each known."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in PROFILES]
    if unknown or not names:
        raise BadRequest(
            f"there is no profile {', '.join(unknown) or repr(text)}; "
            f"profiles are {', '.join(PROFILES)}"
        )
    return names


def select_cases(cases: Mapping[str, Case], wanted: Wanted) -> list[Case]:
    """In the suite's order; BadRequest when there is none."""
    profiles = set(wanted.profiles)
    chosen = [case for case in cases.values() if case.profiles & profiles]
    if wanted.cases is not None:
        chosen = [case for case in chosen if fnmatch.fnmatchcase(case.id, wanted.cases)]
    if not chosen:
        which = f" matches {wanted.cases!r}" if wanted.cases else ""
        raise BadRequest(
            f"no case of profile {','.join(wanted.profiles)}{which}; "
            "`vllm-core conformance list` names them"
        )
    return chosen


def dtypes_of(case: Case, capabilities: Mapping[str, Any], default: str) -> list[str]:
    """In which dtypes a case runs on a backend that declares these."""
    if not case.every_dtype:
        return [default]
    return [dtype for dtype in DTYPES if dtype in capabilities["dtypes"]] or [default]


def plan_tasks(
    cases: Sequence[Case], wanted: Wanted, capabilities: Mapping[str, Any], default: str
) -> list[Task]:
    """Every task of a run, dtype by dtype, so that a worker opens one after the other."""
    declared = capabilities["dtypes"]
    unknown = [dtype for dtype in wanted.dtypes if dtype not in declared]
    if unknown:
        raise BadRequest(
            f"the backend does not declare dtype {', '.join(unknown)}; "
            f"it has {', '.join(sorted(declared))}"
        )
    tasks = []
    for case in cases:
        dtypes = dtypes_of(case, capabilities, default)
        if wanted.dtypes and case.every_dtype:
            dtypes = list(wanted.dtypes)
        elif wanted.dtypes and default not in wanted.dtypes:
            dtypes = [wanted.dtypes[0]]
        tasks += [Task(case, dtype, seed) for dtype in dtypes for seed in wanted.seeds]
    order = {dtype: at for at, dtype in enumerate(dict.fromkeys([default, *DTYPES]))}
    return sorted(tasks, key=lambda task: (order.get(task.dtype, len(order)), task.dtype))


def unopened_tasks(cases: Sequence[Case], wanted: Wanted) -> list[Task]:
    """What stands in the report of a backend that could not be opened."""
    dtypes = wanted.dtypes or (UNKNOWN_DTYPE,)
    return [Task(case, dtype, seed) for case in cases for dtype in dtypes for seed in wanted.seeds]


def cases_digest(ids: Iterable[str], requirements: str, version: str) -> str:
    """Of a set of scored cases: a report from which one was taken away has another."""
    text = "\n".join([requirements, version, *sorted(set(ids))])
    return hashlib.sha256(text.encode()).hexdigest()
