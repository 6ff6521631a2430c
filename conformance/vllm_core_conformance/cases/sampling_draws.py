"""Cases: the token of a draw is the one of the big integers.

Knows: rows, vocabularies and histories that hurt a sampler. Does not know: any backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.ops import Features
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases.ops_call import rng_of
from vllm_core_conformance.cases.sampling_play import (
    ALL,
    LENGTH,
    ROWS,
    Judge,
    awkward_logits,
    awkward_request,
    sample,
)
from vllm_core_conformance.oracle.sampling import Request
from vllm_core_conformance.target import Target

VOCAB = 65
"""One more than a segment of 64."""


def _awkward(target: Target, rng: np.random.Generator, judge: Judge, vocab: int, rows: int) -> None:
    """Every fourth row has a tail that both top-p and min-p look at."""
    logits = awkward_logits(rng, vocab, rows)
    requests = [awkward_request(rng, vocab, x) for x in logits]
    for row in range(0, rows, 4):
        logits[row], requests[row] = _tail(rng, vocab)
    judge.look(logits, requests, *sample(target, logits, requests))


def _tail(rng: np.random.Generator, vocab: int) -> tuple[Any, Request]:
    """A tail that top-p still counts, and that min-p cuts behind it."""
    request = Request(
        temperature=1.6,
        top_p=float(rng.choice([0.9, 0.8, 0.6])),
        min_p=float(rng.choice([0.1, 0.2, 0.3])),
        seed=_seed(rng),
        position=int(rng.integers(1000)),
    )
    return np.round(rng.normal(size=vocab) * 96) / 64, request


def exact(target: Target, seed: int) -> Evidence:
    rng, judge = rng_of("sampling.draw.exact", seed), Judge("draws with all filters")
    for _ in range(8):
        _awkward(target, rng, judge, VOCAB, ROWS)
    return judge.done()


def sizes(target: Target, seed: int) -> Evidence:
    rng, judge = rng_of("sampling.draw.sizes", seed), Judge("draws from small vocabularies")
    for vocab in (1, 2, 63, 64, 1000):
        for _ in range(2):
            _awkward(target, rng, judge, vocab, ROWS)
    return judge.done()


SHORT = 65_536
"""Ids from here on do not fit 16 bits."""


def large(target: Target, seed: int) -> Evidence:
    """Rows nearly or wholly flat, so that each of thousands of tokens has its own short piece of
    the mass, much of it behind id 65,536. Where all are equal, exp leaves no choice. One row has a
    best token, and more mass in tokens of which each has a 30,000th of its own. At last the same
    without filters, which devices draw in another way: there equal pieces are no power of two, so
    that a sum in floats drifts by several of them."""
    vocab = 70_001
    rng, judge = rng_of("sampling.draw.large", seed), Judge(f"draws from {vocab:,} tokens")
    for _ in range(2):
        logits = awkward_logits(rng, vocab, 9)
        logits[:6] = (rng.normal(size=(6, vocab)) * 3).astype(np.float32)
        logits[:6, SHORT:] += 4
        logits[2:5] = 1.5
        logits[1] = -24.0
        logits[1, 17] = 0.0
        requests = [awkward_request(rng, vocab, x) for x in logits]
        for row in range(5):
            requests[row] = Request(temperature=2.0 + row / 3, seed=_seed(rng), position=row)
        requests[5] = Request(temperature=0.0)
        judge.look(logits, requests, *sample(target, logits, requests))
    for row in range(9):
        if row not in (0, 2, 5):
            logits[row], logits[row, 17] = -1.0 - row / 8, 0.0
        requests[row] = Request(temperature=1.0 + row / 4, seed=_seed(rng), position=900 + row)
    judge.look(logits, requests, *sample(target, logits, requests, Features(draw=True)))
    return judge.done()


def real_vocabulary(target: Target, seed: int) -> Evidence:
    """151,936 tokens, of which the last thousands were never trained and are all equal."""
    rng, judge = rng_of("sampling.draw.vocabulary", seed), Judge("draws from 151,936 tokens")
    logits = (rng.normal(size=(5, 151_936)) * 3).astype(np.float32).astype(np.float64)
    logits[:, 145_000:] = logits[:, 17:18]
    logits[3:] = -2.0
    requests = [
        Request(temperature=1.3, seed=int(rng.integers(2**63)), top_p=0.95, position=1_000_000),
        Request(temperature=2.0, seed=int(rng.integers(2**63)), top_k=120_000, min_p=1e-6),
        Request(temperature=2.5, seed=_seed(rng), position=5),
        Request(temperature=3.0, seed=_seed(rng), sequence_index=2, position=0),
        Request(temperature=4.0, seed=_seed(rng), sequence_index=1, position=0),
    ]
    judge.look(logits, requests, *sample(target, logits, requests))
    return judge.done()


def greedy(target: Target, seed: int) -> Evidence:
    """Without a temperature, or one so small that it counts as 0: the lowest id of the best."""
    rng, judge = rng_of("sampling.greedy.ties", seed), Judge("greedy rows")
    for features in (Features(), ALL):
        for scale in (1.0, 1e30):
            logits = np.round(rng.normal(size=(ROWS, VOCAB)) * 2) * scale
            logits = logits.astype(np.float32).astype(np.float64)
            logits[0], logits[1, 1::3] = 4.0 * scale, 99.0 * scale
            logits[2, : VOCAB - 1] = -np.inf
            cold = [0.0] if features == Features() else [0.0, 1e-40, -0.0]
            requests = [
                Request(temperature=float(rng.choice(cold)), seed=int(rng.integers(2**40)), top_k=7)
                for _ in range(ROWS)
            ]
            judge.look(logits, requests, *sample(target, logits, requests, features))
    return judge.done()


def filter_ties(target: Target, seed: int) -> Evidence:
    """Equal logits: top-k keeps exactly k, the lowest ids; top-p the shortest prefix that has its
    mass, also when it has it exactly; min-p what stands exactly at its distance."""
    rng, judge = rng_of("sampling.filters.ties", seed), Judge("filters on equal logits")
    for _ in range(4):
        logits = np.full((ROWS, VOCAB), -np.inf)
        requests: list[Request] = []
        for row in range(ROWS):
            size = int(rng.choice([4, 8, 32, VOCAB]))
            some = np.sort(rng.permutation(VOCAB)[:size])
            logits[row, some] = 1.5
            request = Request(seed=int(rng.integers(-(2**63), 2**63 - 1)), position=row)
            kind = row % 4
            if kind == 0:
                request = replace(request, top_k=int(rng.integers(1, size + 1)))
            elif kind == 1:  # a share that a whole number of tokens has exactly
                kept = int(rng.integers(1, 4)) / 4 if size < VOCAB else 0.3
                request = replace(request, top_p=kept + float(rng.choice([0, 2.0**-23])))
            elif kind == 2:
                request = replace(request, top_k=3, top_p=1e-30 if row % 8 == 2 else 0.6)
            else:
                request = replace(request, min_p=0.5)
                gap = float(request.gap)
                logits[row, some[::2]] = 0.0
                logits[row, some[1::2]] = (
                    -gap if row % 8 == 3 else float(np.nextafter(np.float32(-gap), np.float32(-9)))
                )
            requests.append(request)
        judge.look(logits, requests, *sample(target, logits, requests))
    return judge.done()


FREQUENCIES = (-0.25, 0, 0.75, -1 / 64, 1 / 64, 1 / 64)
"""The small ones tell a count of 15 from one of 300."""


def penalties(target: Target, seed: int) -> Evidence:
    """Repetition looks at prompt and output, presence and frequency at the output only; none at
    what an earlier row left in the history slot; a bias is added before. Most rows in steps of
    1/64: no rounding."""
    rng, judge = rng_of("sampling.penalties.history", seed), Judge("rows with penalties")
    for turn in range(6):
        logits = np.round(rng.normal(size=(ROWS, VOCAB)) * 96) / 64
        logits[:, :12] += 1
        logits[::3] -= 6  # all below 0
        logits[:, 12] += 2
        requests: list[Request] = []
        for row in range(ROWS):
            count = int(rng.integers(1, LENGTH - 8))
            few = int(rng.choice([1, 2, 12]))  # many of one token, or some of many
            awkward = turn == 5
            requests.append(
                Request(
                    temperature=float(rng.choice([0, 0.5, 1])) if not awkward else 0.7,
                    top_k=int(rng.choice([0, 9])) if not awkward else 0,
                    presence=float(rng.choice([-1.5, 0, 0.5])) if not awkward else 0.31,
                    frequency=float(rng.choice(FREQUENCIES)) if not awkward else 0.17,
                    repetition=float(rng.choice([0.5, 1, 2, 4])) if not awkward else 1.3,
                    seed=int(rng.integers(-(2**63), 2**63 - 1)),
                    # the last token is new to half of the rows
                    tokens=(*rng.integers(0, few, count - 1).tolist(), 12 * (row // 2 % 2)),
                    later=tuple(rng.integers(0, 12, int(rng.integers(0, 8))).tolist()),
                    prompt_len=int(rng.integers(0, count // (1 + row % 3) + 1)),
                    bias=dict(enumerate(rng.choice([-2.5, 0.5, 3], 12).tolist()))
                    if row % 2
                    else {},
                )
            )
        for row in range(0, ROWS, 6):  # no slot at all
            requests[row] = Request(seed=requests[row].seed, position=row + 1)
        judge.look(logits, requests, *sample(target, logits, requests))
    return judge.done()


def bias(target: Target, seed: int) -> Evidence:
    """Biased and banned ids, and ids held back until a position."""
    rng, judge = rng_of("sampling.bias.held", seed), Judge("rows with bias and held ids")
    for _ in range(4):
        logits = np.round(rng.normal(size=(ROWS, VOCAB)) * 64) / 32
        requests: list[Request] = []
        for _ in range(ROWS):
            place = int(rng.integers(1, 90))
            ids = rng.permutation(VOCAB)
            values = rng.choice([-np.inf, -np.inf, 2.5, -1.25], 20)
            count = int(rng.choice([0, 1, 20]))
            bias = dict(zip(ids[:count].tolist(), values.tolist()))
            if rng.random() < 0.1:
                bias = dict.fromkeys(ids[1:].tolist(), -np.inf)  # one is left
            x = logits[len(requests)]
            top = np.argsort(-x)[: int(rng.integers(0, 17))]
            held = tuple(top.tolist())[:15] + ((VOCAB + 3,) if rng.random() < 0.5 else ())
            x[[token for token, value in bias.items() if value < -99]] += rng.choice([0, 40])
            requests.append(
                Request(
                    temperature=float(rng.choice([0, 0.5, 1.0])),
                    top_k=int(rng.choice([0, 6])),
                    seed=int(rng.integers(2**63)),
                    position=place,
                    bias=bias,
                    held=held,
                    held_until=place + int(rng.integers(-1, 3)),
                )
            )
        judge.look(logits, requests, *sample(target, logits, requests))
    return judge.done()


def uniforms(target: Target, seed: int) -> Evidence:
    """A thousand equal logits: the token is the uniform's leading digits, so that seed, sequence
    and position each show."""
    rng, judge = rng_of("sampling.seeds.words", seed), Judge("draws among 1000 equal logits")
    base = int(rng.integers(2**62))
    seeds = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), base, base + 1, base + 2**32, base ^ 2**63]
    seeds += [int(s) for s in rng.integers(-(2**63), 2**63 - 1, ROWS - len(seeds))]
    logits = np.full((ROWS, 1000), float(rng.choice([0.0, -3.5, 12.0])))
    for place, index in ((0, 0), (1, 0), (2**22 + 1, 0), (0, 1), (5, 16_383), (2**31 - 1, 7)):
        requests = [Request(seed=s, position=place, sequence_index=index) for s in seeds]
        judge.look(logits, requests, *sample(target, logits, requests))
    return judge.done()


# ---------------------------------------------------------------- all at once
MANY, ODD = 96, 205
"""Rows of one call; tokens, no multiple of anything."""


def everything(target: Target, seed: int) -> Evidence:
    """Bias, bans, held ids, penalties, temperatures, filters, broken rows, in one batch of many.
    What is done to the logits is exact, in steps of 1/64."""
    rng, judge = rng_of("sampling.everything", seed), Judge("rows that ask for everything")
    for _ in range(3):
        logits = np.round(rng.normal(size=(MANY, ODD)) * rng.choice([48, 96, 200], (MANY, 1))) / 64
        logits[::4] -= 8  # all below 0
        requests = [_anything(rng, x) for x in logits]
        for row in rng.permutation(MANY)[:5].tolist():
            logits[row, rng.integers(ODD)] = rng.choice([np.nan, np.inf])
            requests[row] = Request(seed=_seed(rng), top_k=3)
        for place, row in enumerate(rng.permutation(MANY)[:36].tolist()):
            requests[row] = Request(seed=_seed(rng), min_p=0.5, position=row)
            if place < 12:  # half of the tokens stand at min-p's limit
                logits[row] = np.where(rng.random(ODD) < 0.5, -float(requests[row].gap), 0.0)
                continue
            logits[row], requests[row] = _tail(rng, ODD)
        judge.look(logits, requests, *sample(target, logits, requests))
    return judge.done()


def _anything(rng: np.random.Generator, x: Any) -> Request:
    """One row; what is banned or held back would win by far otherwise."""
    best = np.argsort(-x)
    count = int(rng.integers(1, LENGTH - 8))
    some = best[1 : 1 + int(rng.choice([1, 3, 12]))]
    bias: dict[int, float] = {}
    if rng.random() < 0.6:
        ids = np.concatenate((best[:6], rng.permutation(best[6:])[:10]))
        bias = dict(zip(ids.tolist(), rng.choice([-np.inf, 2.5, -1.25, -3, 0.5], 16).tolist()))
    held = tuple(rng.permutation(best[:20])[: int(rng.choice([0, 1, 5, 16]))].tolist())
    is_held = bool(rng.random() < 0.5)
    gone = [token for token, value in bias.items() if value < -99]
    x[[*gone, *(held if is_held else ())]] += 40
    return Request(
        temperature=float(rng.choice([0, 0.3, 0.7, 1, 1.6])),
        top_k=int(rng.choice([0, 0, 1, 4, 30, 130])),
        top_p=float(rng.choice([1, 1, 0.97, 0.8, 0.4])),
        min_p=float(rng.choice([0, 0, 0.01, 0.1, 0.4])),
        presence=float(rng.choice([-1.5, 0, 0.5])),
        frequency=float(rng.choice(FREQUENCIES)),
        repetition=float(rng.choice([0.5, 1, 2])),
        seed=_seed(rng),
        sequence_index=int(rng.choice([0, 1, 300])),
        tokens=(*rng.choice(some, count - 1).tolist(), int(best[int(rng.integers(2))])),
        later=tuple(best[:8].tolist()),
        prompt_len=int(rng.integers(0, count + 1)),
        bias=bias,
        held=held,
        held_until=count + (1 if is_held else int(rng.choice([0, -1]))),
    )


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(-(2**63), 2**63 - 1))


COARSER = (
    (Features(), "greedy"),
    (Features(draw=True), "draw"),
    (Features(draw=True, filters=True), "filters"),
    (Features(draw=True, penalties=True, bias=True), "penalties and bias"),
)


def features(target: Target, seed: int) -> Evidence:
    """A program compiled for more features draws the same tokens as one for just enough."""
    rng, judge = rng_of("sampling.features.cover", seed), Judge("rows that need few features")
    for least, _ in COARSER:
        logits = awkward_logits(rng, VOCAB)
        logits[np.abs(logits) < 1e-30] = 0
        if least.penalties:
            logits = np.round(rng.normal(size=(ROWS, VOCAB)) * 96) / 64
        requests: list[Request] = []
        for x in logits:
            request = awkward_request(rng, VOCAB, x)
            if not least.draw:
                request = replace(request, temperature=0.0)
            if not least.filters:
                request = replace(request, top_k=0, top_p=1.0, min_p=0.0)
            if not least.bias:
                request = replace(request, bias={})
            if least.penalties:  # in steps of 1/64: no rounding
                tokens = tuple(rng.integers(0, 12, 30).tolist())
                request = replace(request, position=None, tokens=tokens, prompt_len=20)
                request = replace(request, presence=0.5, frequency=0.25, repetition=2.0)
            requests.append(request)
        one = sample(target, logits, requests, least)
        judge.look(logits, requests, *one)
        judge.look(logits, requests, *sample(target, logits, requests, ALL))
    return judge.done()


def neighbours(target: Target, seed: int) -> Evidence:
    """A row's token depends neither on its place in the batch nor on who else is there."""
    rng, judge = rng_of("sampling.rows.neighbours", seed), Judge("rows among other rows")
    logits = np.round(awkward_logits(rng, VOCAB), 3).astype(np.float32).astype(np.float64)
    requests = [awkward_request(rng, VOCAB, x) for x in logits]
    first, _ = sample(target, logits, requests)
    judge.look(logits, requests, first)
    for _ in range(3):
        order = rng.permutation(ROWS)
        half = order[: ROWS // 2]
        others = awkward_logits(rng, VOCAB)
        mixed = [awkward_request(rng, VOCAB, x) for x in others]
        places = rng.permutation(ROWS)[: len(half)]
        for place, row in zip(places, half):
            others[place], mixed[place] = logits[row], requests[row]
        again, _ = sample(target, others, mixed)
        for place, row in zip(places.tolist(), half.tolist()):
            judge.look(logits[row : row + 1], [requests[row]], again[place : place + 1])
            if again[place] != first[row] and np.isfinite(logits[row].max()):
                require(
                    judge.edges > 0,
                    f"row {row} drew {first[row]}, and {again[place]} at place {place} of another "
                    "batch",
                )
    return judge.done()


def faults(target: Target, seed: int) -> Evidence:
    """NaN, +inf or nothing finite in a row is a flag of that row and nothing to the others."""
    rng, judge = rng_of("sampling.rows.fault", seed), Judge("sound rows beside broken ones")
    checks = 0
    for features in (ALL, Features(), Features(draw=True)):
        logits = np.round(rng.normal(size=(ROWS, VOCAB)) * 64) / 32
        bad = rng.permutation(ROWS)[:6]
        logits[bad[0], rng.integers(VOCAB)] = np.nan
        logits[bad[1]] = np.nan
        logits[bad[2]] = -np.inf
        logits[bad[3], VOCAB - 1] = np.inf
        logits[bad[4], 0] = np.nan
        logits[bad[5], VOCAB - 1] = np.nan
        requests = [
            Request(
                temperature=1.0 if features.draw else 0.0,
                top_k=7 if features.filters else 0,
                top_p=0.9 if features.filters else 1.0,
                seed=int(rng.integers(2**63)),
                position=3,
            )
            for _ in range(ROWS)
        ]
        tokens, fault = sample(target, logits, requests, features)
        want = np.isin(np.arange(ROWS), bad).astype(np.int64)
        wrong = np.flatnonzero(fault != want)
        require(
            not len(wrong),
            f"fault flags of rows {wrong.tolist()} are {fault[wrong].tolist()}; broken rows are "
            f"{sorted(bad.tolist())} (NaN, +inf, or nothing finite)",
            rows=wrong.tolist(),
        )
        checks += ROWS
        good = np.setdiff1d(np.arange(ROWS), bad)
        judge.look(logits[good], [requests[i] for i in good], tokens[good])
    evidence = judge.done()
    evidence.checks += checks
    return evidence


_CORE, _SMOKE = frozenset({"core"}), frozenset({"core", "smoke"})


def _case(name: str, says: str, run: Any, profiles: frozenset[str] = _CORE) -> Case:
    return Case(f"sampling.{name}", says, run, profiles)


CASES: tuple[Case, ...] = (
    _case("draw.exact", "draws the token of the exact integers, every filter on", exact, _SMOKE),
    _case("draw.sizes", "does so for 1, 2, 63, 64 and 1000 tokens", sizes),
    _case("draw.large", "does so for 70,001 tokens, most of the mass behind id 65,536", large),
    _case("draw.vocabulary", "does so for 151,936 tokens with untrained ones", real_vocabulary),
    _case("greedy.ties", "gives greedy ties to the lowest id", greedy),
    _case("filters.ties", "cuts among equal logits exactly", filter_ties, _SMOKE),
    _case(
        "penalties.history", "penalises what the row itself has seen and drawn", penalties, _SMOKE
    ),
    _case("bias.held", "adds bias, bans, and holds ids back until their position", bias),
    _case(
        "seeds.words", "draws by all 64 bits of the seed, the sequence and the position", uniforms
    ),
    _case("everything", "draws right when rows ask for everything at once", everything),
    _case("features.cover", "draws the same with more features compiled than needed", features),
    _case("rows.neighbours", "draws the same in any batch", neighbours),
    _case("rows.fault", "flags broken rows and spares their neighbours", faults, _SMOKE),
)
