"""Draws on a backend, beside the oracle, and the sentence for a draw that is wrong.

Knows: how rows of a step are packed for `sample`, what authors get wrong. Does not know: any
backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Features
from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.oracle.sampling import Draw, Request, adjusted, pack, roughness
from vllm_core_conformance.target import Target

Numbers = NDArray[Any]

ALL = Features(draw=True, filters=True, penalties=True, bias=True)
ROWS, LENGTH = 24, 320
"""Rows of a call and length of a history: one compiled shape per vocabulary. A history holds more
of one token than 8 bits count."""
GIVEN = ("logits", "params", "positions", "history", "bias")
MOST_EDGES = 0.01
"""Share of draws that may be decided by the last bit of exp."""


def sample(
    target: Target,
    logits: Numbers,
    requests: Sequence[Request],
    features: Features = ALL,
) -> tuple[Numbers, Numbers]:
    """(tokens, fault) of one call; of several, where fewer rows are declared to get logits."""
    ops: Any = target.ops
    most = target.caps.max_logit_rows or len(requests)
    if len(requests) > most:
        parts = [slice(at, at + most) for at in range(0, len(requests), most)]
        pairs = [sample(target, logits[part], requests[part], features) for part in parts]
        return np.concatenate([t for t, _ in pairs]), np.concatenate([f for _, f in pairs])

    def fn(*arrays: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = ops.sample(*arrays, features)
        return found

    packed = pack(requests, logits.shape[1], LENGTH)
    arrays = [target.array(x, "float32") for x in (logits, *packed)]
    tokens, fault = target.call(("sample", features), fn, *arrays)
    for name, host, array in zip(GIVEN, (logits, *packed), arrays):
        _check_kept(name, host, target.fetch(array))
    require(
        tokens.shape == fault.shape == (len(requests),),
        f"sample: tokens {list(tokens.shape)} and faults {list(fault.shape)} for "
        f"{len(requests)} rows",
    )
    return np.asarray(tokens).astype(np.int64), np.asarray(fault).astype(np.int64)


def _check_kept(name: str, host: Numbers, now: Any) -> None:
    """Whoever calls `sample` reads its arguments again: log-probabilities are of the same logits.
    What a device may flush to 0 does not count."""
    before, after = np.asarray(host, np.float64), np.asarray(now).astype(np.float64)
    tiny = np.maximum(np.abs(before), np.abs(after)) < 2.0**-126
    same = (before == after) | (np.isnan(before) & np.isnan(after)) | tiny
    same |= np.float32(before) == np.float32(after)
    require(bool(same.all()), f"sample changed its input {name}: {int((~same).sum())} values")


@dataclass
class Judge:
    """Compares draws with the oracle; counts those that the last bit of exp decided."""

    what: str
    draws: int = 0
    edges: int = 0
    wrong: list[tuple[int, Request, Numbers, int, int]] = field(default_factory=list)
    """(row, request, logits, got, expected)"""

    def look(
        self,
        logits: Numbers,
        requests: Sequence[Request],
        tokens: Numbers,
        fault: Numbers | None = None,
    ) -> None:
        for row, (x, request, got) in enumerate(zip(logits, requests, tokens.tolist())):
            draw = draw_of(x, request)
            want = draw.token()
            if fault is not None:
                require(
                    int(fault[row]) == int(want < 0),
                    f"{self.what}: row {row} has fault {int(fault[row])}, its best logit is "
                    f"{draw.x.max()}; expected {int(want < 0)}",
                )
            self.draws += 1
            if want < 0 or got == want:
                continue
            if draw.allows(got):
                self.edges += 1
            else:
                self.wrong.append((row, request, x, got, want))

    def done(self) -> Evidence:
        if self.wrong:
            raise self._failure()
        require(
            self.edges <= max(2, MOST_EDGES * self.draws),
            f"{self.what}: {self.edges} of {self.draws} draws differ from the exact weights' by "
            "the last bits of exp; an honest exp does so once in a million",
            edges=self.edges,
            draws=self.draws,
        )
        return Evidence(
            checks=self.draws, figures={"draws": self.draws, "draws at an edge of exp": self.edges}
        )

    def _failure(self) -> Failed:
        row, request, logits, got, want = self.wrong[0]
        cause = self._cause()
        return Failed(
            f"{self.what}: {len(self.wrong)} of {self.draws} draws are wrong; row {row} "
            f"({_words(request)}) drew token {got} of {len(logits)}, expected {want}"
            + (f": as if {cause}" if cause else ""),
            row=row,
            got=got,
            expected=want,
            wrong=len(self.wrong),
            draws=self.draws,
        )

    def _cause(self) -> str:
        """The mistake that explains most of the wrong draws, if it explains two thirds of them."""
        some = self.wrong[:40]
        best, most = "", 2 / 3 * len(some)
        for name, change in MISTAKES.items():
            explained = 0
            for _, request, logits, got, _ in some:
                explained += draw_of(logits, change(request)).token() == got
            if explained > most or (explained == len(some) and not best):
                best, most = name, explained
        return best


def draw_of(logits: Numbers, request: Request) -> Draw:
    x = adjusted(logits, request)
    is_exact = math.frexp(request.repetition)[0] == 0.5 and all(
        float(v * 64).is_integer() for v in (request.presence, request.frequency)
    )
    return Draw(x, request, 0.0 if is_exact else roughness(x, request))


MISTAKES: dict[str, Callable[[Request], Request]] = {
    "the temperature were ignored": lambda r: replace(r, temperature=1.0),
    "the row were greedy": lambda r: replace(r, temperature=0.0),
    "top-k were ignored": lambda r: replace(r, top_k=0),
    "top-k kept one token more": lambda r: replace(r, top_k=r.top_k + bool(r.top_k)),
    "top-k kept one token less": lambda r: replace(r, top_k=max(r.top_k - 1, min(r.top_k, 1))),
    "top-p were ignored": lambda r: replace(r, top_p=1.0),
    "min-p were ignored": lambda r: replace(r, min_p=0.0),
    "all filters were ignored": lambda r: replace(r, top_k=0, top_p=1.0, min_p=0.0),
    "the high word of the seed were ignored": lambda r: replace(r, seed=r.seed & 0xFFFFFFFF),
    "the seed were ignored": lambda r: replace(r, seed=0),
    "the sequence index were ignored": lambda r: replace(r, sequence_index=0),
    "the bias were ignored": lambda r: replace(r, bias={}),
    "held ids were not held": lambda r: replace(r, held=()),
    "held ids were held one position longer": lambda r: replace(r, held_until=r.held_until + 1),
    "presence were ignored": lambda r: replace(r, presence=0.0),
    "frequency were ignored": lambda r: replace(r, frequency=0.0),
    "repetition were ignored": lambda r: replace(r, repetition=1.0),
    "presence and frequency counted the prompt": lambda r: replace(r, prompt_len=0),
    "penalties counted what an earlier row left in the history": lambda r: replace(
        r, tokens=r.tokens + r.later, position=None
    ),
    "the position of the uniform were one less": lambda r: replace(
        r, tokens=() if not r.tokens else r.tokens, position=r.place - 1
    ),
    "the position of the uniform were one more": lambda r: replace(r, position=r.place + 1),
}


def _words(r: Request) -> str:
    """What the row asks for, defaults left out."""
    usual, said = Request(), [f"temperature {r.temperature:g}"]
    for name in (
        "top_k top_p min_p presence frequency repetition seed sequence_index held_until"
    ).split():
        value = getattr(r, name)
        if value != getattr(usual, name):
            said.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    if r.bias:
        said.append(f"{len(r.bias)} biased ids")
    said.append(f"position {r.place}")
    return ", ".join(said)


# ---------------------------------------------------------------- what hurts
def awkward_logits(rng: np.random.Generator, vocab: int, rows: int = ROWS) -> Numbers:
    """Ties by the hundred, bans, denormals, huge values, single candidates, a broken row; float32
    values."""
    x = rng.normal(size=(rows, vocab)) * rng.choice([0.1, 1, 4, 20], (rows, 1))
    start = int(rng.integers(12))
    for row in range(rows):
        kind = (row + start) % 12
        if kind == 1:
            x[row] = np.round(x[row] * 2) / 2
        elif kind == 2:
            x[row] = 7.0
        elif kind == 3:
            x[row, rng.random(vocab) < 0.7] = -np.inf
            x[row, rng.integers(vocab)] = 1.0
        elif kind == 4:
            x[row] = -np.inf
            x[row, rng.integers(vocab)] = -3.0
        elif kind == 5:
            x[row] = np.where(rng.random(vocab) < 0.5, 0.0, -0.0)
        elif kind == 6:
            x[row] = rng.normal(size=vocab) * 1e-40
        elif kind == 7:
            x[row] *= 1e30
        elif kind == 8:
            x[row] = -1e4 + np.round(x[row])
        elif kind == 9:  # untrained ids, all equal
            x[row] = np.where(rng.random(vocab) < 0.9, x[row].max(), x[row])
        elif kind == 10:  # a fault of this row alone
            x[row, rng.integers(vocab)] = rng.choice([np.nan, np.inf])
    with np.errstate(under="ignore"):
        return np.asarray(x.astype(np.float32).astype(np.float64))


def awkward_request(rng: np.random.Generator, vocab: int, logits: Numbers) -> Request:
    """One row; penalties only where float32 leaves one honest way to round them."""
    tiny = bool((np.abs(logits[np.isfinite(logits)]) < 1e-30).any())
    temperatures = [0.3, 0.8, 1, 1.7, 1e4] + ([] if tiny else [0, 1e-40, 1e-30, 1e30])
    return Request(
        temperature=float(rng.choice(temperatures)),
        top_k=int(rng.choice([0, 0, 0, 1, 2, 5, 40, vocab - 1, vocab, vocab + 5])),
        top_p=float(rng.choice([1, 1, 0.999, 0.95, 0.8, 0.5, 0.1, 1e-9])),
        min_p=float(rng.choice([0, 0, 0.001, 0.05, 0.2, 0.5])),
        seed=int(rng.integers(-(2**63), 2**63 - 1)),
        sequence_index=int(rng.choice([0, 1, 5, 16_383])),
        position=int(rng.choice([0, 1, 77, 4_000_000])),
        bias={int(rng.integers(vocab)): 2.5} if rng.random() < 0.2 else {},
    )
