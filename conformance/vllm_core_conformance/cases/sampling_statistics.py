"""Cases: many draws have the distribution that was asked for and do not depend on each other.

Every test has two stages, decided beforehand: the first rejects at ALPHA; only then the second
runs, with a fresh seed and four times the draws, and both must reject. Twenty tests a run keep the
chance of any false alarm under 20 * ALPHA^2 = 2e-7.

Knows: chi-square tests. Does not know: how the draws are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Column, Features
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.ops_call import rng_of
from vllm_core_conformance.cases.sampling_play import Judge
from vllm_core_conformance.oracle.sampling import Request, chi_square, pack, survival
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]

ALPHA = 1e-4
BATCH = 2048
FIRST = 4
"""Batches of the first stage; the second takes four times as many."""
SHARES = np.array([30, 20, 12, 10, 8, 6, 5, 4, 2, 1, 1, 1], np.float64)
LOGITS = np.log(SHARES / SHARES.sum()).astype(np.float32)

Draws = Callable[[int, np.random.Generator], list[tuple[Numbers, Numbers]]]


@dataclass
class Sampler:
    """Tokens by the thousand."""

    target: Target

    def draw(
        self,
        request: Request,
        *,
        seeds: Numbers | None = None,
        indices: Numbers | None = None,
        positions: Numbers | None = None,
    ) -> Numbers:
        """One token per element of whichever varies (their length a multiple of BATCH)."""
        ops: Any = self.target.ops
        filters = bool(request.top_k or request.min_p or request.top_p < 1)
        features = Features(draw=True, filters=filters)
        (count,) = {len(x) for x in (seeds, indices, positions) if x is not None}
        params, place, history, bias = pack([request], len(LOGITS), 1)
        params, place = np.repeat(params, count, 0), np.repeat(place, count)
        if seeds is not None:
            words = seeds.astype(np.int64).view(np.int32).reshape(-1, 2)
            params[:, [Column.SEED_LOW, Column.SEED_HIGH]] = words
        if indices is not None:
            params[:, Column.SEQUENCE_INDEX] = indices
        if positions is not None:
            place = positions.astype(np.int32)
        most = self.target.caps.max_logit_rows or BATCH
        batch = min(BATCH, 1 << most.bit_length() - 1)
        logits = self.target.array(np.repeat(LOGITS[None], batch, 0), "float32")
        rest = self.target.array(history), self.target.array(bias, "float32")

        def fn(*arrays: Any) -> tuple[Any, ...]:
            found: tuple[Any, ...] = ops.sample(*arrays, features)
            return found

        found = []
        for at in range(0, count, batch):
            part = slice(at, at + batch)
            some = self.target.array(params[part]), self.target.array(place[part])
            tokens, fault = self.target.call(("sample", features), fn, logits, *some, *rest)
            require(not np.asarray(fault).any(), "sample: sound rows are flagged as faults")
            found.append(np.asarray(tokens).astype(np.int64))
        tokens = np.concatenate(found)
        outside = (tokens < 0) | (tokens >= len(LOGITS))
        require(not outside.any(), f"sample: drew {tokens[outside][:3]} of {len(LOGITS)} tokens")
        return tokens


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(-(2**63), 2**63 - 1))


def _probability(temperature: float = 1.0, kept: int = len(SHARES)) -> Numbers:
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    p[kept:] = 0
    return np.asarray(p / p.sum())


def _single(tokens: Numbers, p: Numbers) -> tuple[Numbers, Numbers]:
    return np.bincount(tokens, minlength=len(p)), p


def _pairs(one: Numbers, two: Numbers, p: Numbers) -> tuple[Numbers, Numbers]:
    """Counts of both together, under independence."""
    counts = np.bincount(one * len(p) + two, minlength=len(p) ** 2)
    return counts, np.outer(p, p).ravel()


def _two_stages(
    what: str, target: Target, case_id: str, seed: int, experiment: Callable[..., Any]
) -> Evidence:
    """experiment(sampler, count, rng) -> {name: (counts, probabilities)}."""
    sampler, rng = Sampler(target), rng_of(case_id, seed)
    first = experiment(sampler, FIRST * BATCH, rng)
    suspects = {name for name, test in first.items() if _p_value(*test) < ALPHA}
    evidence = Evidence(checks=len(first))
    if not suspects:
        return evidence
    second = experiment(sampler, 4 * FIRST * BATCH, rng_of(f"{case_id} again", seed))
    for name in sorted(suspects):
        p = _p_value(*second[name])
        if p < ALPHA:
            counts, expected = second[name]
            raise Failed(
                f"{what}, {name}: {int(counts.sum())} draws do not have the distribution that was "
                f"asked for (chi-square p {p:.1e} after p {_p_value(*first[name]):.1e}); "
                f"{_worst(counts, expected)}",
                p=p,
                counts=counts.tolist(),
            )
    evidence.notes.append(f"{what}: {sorted(suspects)} needed the second stage and passed it")
    return evidence


def _p_value(counts: Numbers, probability: Numbers) -> float:
    statistic, freedom = chi_square(counts, probability)
    return 0.0 if np.isinf(statistic) else survival(statistic, freedom)


def _worst(counts: Numbers, probability: Numbers) -> str:
    expected = probability * counts.sum()
    place = int(np.argmax(np.abs(counts - expected) / np.sqrt(expected + 1)))
    return f"cell {place} came {int(counts[place])} times, expected {expected[place]:.0f}"


def positions(target: Target, seed: int) -> Evidence:
    def experiment(sampler: Sampler, count: int, rng: np.random.Generator) -> Any:
        place, p = np.arange(count) + int(rng.integers(2**20)), _probability()
        one = sampler.draw(Request(seed=_seed(rng)), positions=place)
        two = sampler.draw(Request(seed=_seed(rng)), positions=place)
        warm = sampler.draw(Request(seed=_seed(rng), temperature=1.9), positions=place)
        near = sampler.draw(Request(position=9), seeds=np.arange(count) + _seed(rng) // 2)
        asked = _seed(rng)
        first, second = (
            sampler.draw(Request(seed=asked, sequence_index=i), positions=place) for i in (0, 1)
        )
        return {
            "one request": _single(one, p),
            "temperature 1.9": _single(warm, _probability(1.9)),
            "a token and the next": _pairs(one[:-1:2], one[1::2], p),
            "two requests at the same positions": _pairs(one, two, p),
            "a seed and the next": _pairs(near[:-1:2], near[1::2], p),
            "two sequences of a request": _pairs(first, second, p),
        }

    return _two_stages("along positions", target, "sampling.statistics.positions", seed, experiment)


def exactly(target: Target, seed: int) -> Evidence:
    """Thousands of draws at temperatures that no short float holds, each held to the integers: a
    weight that is a little wrong moves a few of them."""
    rng, judge = rng_of("sampling.draw.many", seed), Judge("draws at awkward temperatures")
    sampler, logits = Sampler(target), LOGITS.astype(np.float64)[None]
    for _ in range(2):
        request = Request(seed=_seed(rng), temperature=float(rng.uniform(0.4, 2.5)))
        place = np.arange(BATCH) + int(rng.integers(2**20))
        tokens = sampler.draw(request, positions=place)
        requests = [replace(request, position=int(at)) for at in place]
        judge.look(np.repeat(logits, BATCH, 0), requests, tokens)
    return judge.done()


def filters(target: Target, seed: int) -> Evidence:
    def experiment(sampler: Sampler, count: int, rng: np.random.Generator) -> Any:
        place = np.arange(count)
        asked = {
            "top_k 4": (Request(top_k=4), 4),
            "top_p 0.7": (Request(top_p=0.7), 4),  # 30 + 20 + 12 is 0.62, + 10 is 0.72
            "min_p 0.25": (Request(min_p=0.25), 5),  # 8 / 30 stays, 6 / 30 goes
        }
        found = {}
        for name, (request, kept) in asked.items():
            asking = Request(
                seed=_seed(rng), top_k=request.top_k, top_p=request.top_p, min_p=request.min_p
            )
            found[name] = _single(sampler.draw(asking, positions=place), _probability(kept=kept))
        return found

    return _two_stages("with filters", target, "sampling.statistics.filters", seed, experiment)


_CORE = frozenset({"core"})

CASES: tuple[Case, ...] = (
    Case(
        "sampling.draw.many",
        "divides by the temperature in full precision: thousands of draws are exact",
        exactly,
        _CORE,
    ),
    Case(
        "sampling.statistics.positions",
        "draws independently and by the asked distribution along positions, seeds and sequences",
        positions,
        _CORE,
    ),
    Case(
        "sampling.statistics.filters",
        "draws what is left by filters in its proportions",
        filters,
        _CORE,
    ),
)
