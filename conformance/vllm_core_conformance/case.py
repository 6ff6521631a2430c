"""What a case is, and what it may say.

A case returns `Evidence` when the backend is right and raises `Failed` when it is wrong. It cannot
skip: what a backend need not have is named in `needs`, and then it must refuse or be right.

Knows: names, profiles, verdicts of one case. Does not know: any backend, processes, reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_core_conformance.target import Target

PROFILES = {
    "smoke": "the sharpest probes of every area, in seconds",
    "contract": "manifest, lifecycle, versions, errors, honesty of what is declared",
    "core": "attention, KV cache, ops, weights, sampling, programs, memory",
    "serving": "whole engine: the same tokens under any batching, chunking, preemption, prefix hit",
    "deterministic": "the same bits again, and in any batch where that is declared",
    "quantised": "weights and caches of few bits: right, and refused where undeclared",
    "distributed": "collectives between the devices of a group",
    "performance": "reported apart, never scored",
}


@dataclass(frozen=True)
class Measure:
    """How large the errors of one op were, in units of its own noise and of its limits."""

    op: str
    rms: float
    max: float
    count: int
    rms_limit: float
    max_limit: float

    @property
    def load(self) -> float:
        """Largest share of a limit that was used; above 1 fails class A."""
        return max(self.rms / self.rms_limit, self.max / self.max_limit)


@dataclass
class Evidence:
    """What a passing case saw."""

    checks: int = 0
    """Comparisons that could have failed; a case with none is an error of the suite."""
    measures: list[Measure] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Anything else worth a line in the report, by name with unit."""
    notes: list[str] = field(default_factory=list)

    def __iadd__(self, other: Evidence) -> Evidence:
        self.checks += other.checks
        self.measures += other.measures
        self.figures |= other.figures
        self.notes += other.notes
        return self


class Failed(Exception):
    """The backend is wrong. The first argument is one sentence in the words of the domain."""

    def __init__(self, sentence: str, **details: Any) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.details: Mapping[str, Any] = details
        """Plain data (numbers, strings, lists) for the report."""


def require(claim: bool, sentence: str, **details: Any) -> None:
    """Failed(sentence) unless the claim holds."""
    if not claim:
        raise Failed(sentence, **details)


@dataclass(frozen=True)
class Case:
    """One thing that a backend must get right."""

    id: str
    """area.what.variant; stable: reports and `repro` speak of it."""
    says: str
    """What a backend that passes does, in one sentence."""
    run: Callable[[Target, int], Evidence]
    """(target, seed) -> Evidence, or raises Failed. Everything random follows from the seed."""
    profiles: frozenset[str]
    needs: tuple[str, ...] = ()
    """Capabilities (fields that are true, "dtype:bfloat16", "scheme:int8", "kv:int8") without which
    a backend may refuse with NotSupported; it must not compute something wrong instead."""
    every_dtype: bool = False
    """Runs once in each 16- and 32-bit dtype that the backend declares; else once."""
    scored: bool = True
    fresh: bool = False
    """Needs a runtime of its own (it closes it, exhausts it or counts what it holds)."""
    time_limit: float = 60.0
    """Seconds until the supervisor gives up."""

    @property
    def area(self) -> str:
        return self.id.partition(".")[0]
