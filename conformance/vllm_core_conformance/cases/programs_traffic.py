"""Case: programs under traffic: two sessions, two buckets, uploads ahead of their turn, late
fetches and failures in the middle, in a random order, against the model of the host.

Knows: events, what must come out of each. Does not know: kernels, which runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.cases.contract_works import require_steady
from vllm_core_conformance.cases.programs_echo import LARGE, ROWS, SMALL, VOCAB, Weights
from vllm_core_conformance.cases.programs_session import Pending, Session
from vllm_core_conformance.cases.programs_values import MARK, error_of
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling, wide

Numbers = NDArray[Any]

EVENTS = ("step", "chunk", "ahead", "bias", "tables", "failure", "check", "export")
TURNS = 26
LONG = 52


class Traffic:
    """Two sessions with weights of their own on one runtime."""

    def __init__(self, target: Target, rng: np.random.Generator) -> None:
        self.target, self.rng, self.evidence = target, rng, Evidence()
        self.weights = [Weights.make(target, rng) for _ in range(2)]
        self.sessions = [Session(target, rng) for _ in range(2)]
        self.waiting: list[tuple[int, Pending, Any]] = []
        """Session, step, a fetch on its way or None."""
        self.handed: list[tuple[Numbers, Numbers]] = []
        """Exports that the caller keeps, and what they were."""
        for session in self.sessions:
            session.rivals = self.weights
            session.admit(0, 3, bias_slot=0)
            session.admit(1, 2 * session.echo.block_tokens + 1 if self._fits(session) else 4)
            session.admit(2, 5)
            session.admit(5, 1)

    @staticmethod
    def _fits(session: Session) -> bool:
        return 2 * session.echo.block_tokens + 1 <= LARGE // 2

    # ---- events
    def begin(self) -> None:
        """Every prompt in the large bucket, then one step in the small one: all is compiled."""
        for which, session in enumerate(self.sessions):
            for row, request in session.sequences.items():
                self._submit(which, [(row, len(request.tokens))], LARGE)
            self._submit(which, [(0, 1), (5, 1)], SMALL)
            session.force(0, int(self.rng.integers(VOCAB)))
            session.move_cells(2, 1, [])
            self._submit(which, [(1, 1), (2, 1)], SMALL)

    def _submit(self, which: int, work: list[tuple[int, int]], tokens: int) -> None:
        session = self.sessions[which]
        pending = session.submit(work, self.weights[which], tokens)
        self._wait_for(which, pending)

    def _wait_for(self, which: int, pending: Pending) -> None:
        fetch = None
        if self.rng.random() < 0.5:
            with calling("fetch"):
                fetch = self.target.runtime.fetch(pending.result)
        self.waiting.append((which, pending, fetch))

    def _decoding(self, which: int) -> list[tuple[int, int]]:
        rows = [row for row, s in self.sessions[which].sequences.items() if s.computed]
        some = self.rng.permutation(rows)[: int(self.rng.integers(1, ROWS + 1))]
        return [(int(row), 1) for row in some]

    def step(self, which: int) -> None:
        self._submit(which, self._decoding(which), SMALL if self.rng.random() < 0.7 else LARGE)

    def chunk(self, which: int) -> None:
        """A request comes in two chunks, the second one beside rows that decode."""
        session, row = self.sessions[which], 3 + int(self.rng.integers(2))
        if row in session.sequences:
            session.finish(row)
        session.admit(row, 7)
        self._submit(which, [(row, 4)], SMALL)
        self._submit(which, [(row, 3), (0, 1)], SMALL)

    def ahead(self, which: int) -> None:
        """Steps of both sessions are packed and uploaded before either runs, in other order."""
        packed = []
        for index in (which, 1 - which):
            session = self.sessions[index]
            layout = session.echo.layout(SMALL)
            buffer, host, work = session.pack(session.parts(self._decoding(index))[0], layout)
            packed.append((index, work, session.upload(buffer, host, layout), layout))
        for index, work, device_step, layout in packed[::-1]:
            session = self.sessions[index]
            pending = session.run(work, device_step, self.weights[index], layout)
            self._wait_for(index, pending)

    def bias(self, which: int) -> None:
        self.sessions[which].force(0, int(self.rng.integers(VOCAB)))
        self._submit(which, [(0, 1)], SMALL)

    def tables(self, which: int) -> None:
        """A row reads another row's first block for one step, and then its own again."""
        session = self.sessions[which]
        one, two = (session.sequences[row] for row in (1, 2))
        size = session.echo.block_tokens
        if min(one.computed, two.computed) < size:
            self._submit(which, [(1, 1), (2, 1)], SMALL)
            return
        session.move_cells(2, 1, [0])
        self._submit(which, [(2, 1), (1, 1)], SMALL)
        session.move_cells(2, 2, [0])
        two.context[:size] = two.tokens[:size]
        self._submit(which, [(2, 1)], SMALL)

    def failure(self, which: int) -> None:
        """A program that raises between steps that are not fetched yet."""
        self._submit(which, self._decoding(which), SMALL)
        error, texts = error_of(self.target), []
        if error is None:
            raise Failed("a program that raised among running steps seemed to work")
        while error is not None:
            texts.append(str(error))
            error = error.__cause__ or error.__context__
        require(
            any(MARK in text for text in texts),
            f"a program raised {MARK!r} among running steps; the caller was told {texts[0]!r}",
        )
        self.evidence.checks += 1

    def check(self, which: int) -> None:
        """Some of what was submitted, in any order."""
        for place in sorted(self.rng.permutation(len(self.waiting))[:4], reverse=True):
            self._judge(*self.waiting.pop(int(place)))

    def export(self, which: int) -> None:
        """Blocks go to the host and stay there as they are, whatever runs later."""
        session = self.sessions[which]
        count = session.echo.num_blocks - 1
        with calling("export_blocks"):
            found = self.target.runtime.attention.export_blocks(
                session.kv, session.echo.groups[0], list(range(1, count + 1))
            )
        if len(self.handed) < 6:
            self.handed += [(np.asarray(x), np.array(x)) for x in found.values()]
        self.evidence += session.check_cache(self.weights[which], f" of session {which}")

    def renew(self) -> None:
        """Sequences that have become long make room for new requests of the same row."""
        for which, session in enumerate(self.sessions):
            for row in [r for r, s in session.sequences.items() if s.computed > LONG]:
                slot = session.sequences[row].bias_slot
                session.finish(row)
                session.admit(row, 3, bias_slot=slot)
                self._submit(which, [(row, 3)], SMALL)

    # ---- judgement
    def _judge(self, which: int, pending: Pending, fetch: Any) -> None:
        session, result = self.sessions[which], None
        if fetch is not None:
            with calling("wait of a fetch"):
                result = fetch.wait()
        later = len(session.log) - 1 - pending.number
        when = f" of session {which}, looked at {later} steps later"
        self.evidence += session.check(pending, result, when)
        self.evidence += session.check_padding(pending, when)

    def end(self) -> None:
        for place in self.rng.permutation(len(self.waiting)):
            self._judge(*self.waiting[int(place)])
        for which, session in enumerate(self.sessions):
            self.evidence += session.check_state(f" of session {which} after the traffic")
            self.evidence += session.check_cache(
                self.weights[which], f" of session {which} after the traffic"
            )
        for got, then in self.handed:
            self.evidence += require_equal(
                wide(got),
                wide(then),
                "blocks that were exported earlier and are still held by the caller",
                axes=("layer", "place", "token", "head", "lane"),
                nan_equal=True,
            )


def traffic(target: Target, rng: np.random.Generator) -> Evidence:
    """Random turns; each kind of event at least twice."""
    both = Traffic(target, rng)
    both.begin()
    known = target.runtime.num_compilations()
    evidence = require_counted(target, known)
    events = [
        *EVENTS,
        *EVENTS,
        *rng.choice([e for e in EVENTS if e != "failure"], TURNS - 2 * len(EVENTS)),
    ]
    for event in rng.permutation(events):
        run: Callable[[int], None] = getattr(both, str(event))
        before = target.runtime.num_compilations()
        run(int(rng.integers(2)))
        grown = target.runtime.num_compilations() - before
        require(
            event == "failure" or grown == 0,
            f"{grown} compilations in an event of traffic ({event}) whose programs and shapes had "
            "all run before",
        )
        evidence.checks += 1
        both.renew()
    both.end()
    evidence += both.evidence
    evidence += require_steady(target, "after traffic")
    return evidence


def require_counted(target: Target, compiled: int) -> Evidence:
    """A device that compiles for shapes tells of it."""
    require(
        compiled > 0 or not target.is_static,
        "static shapes are declared, and num_compilations is 0 after the first steps: compilations "
        "are not counted",
    )
    return Evidence(checks=1)
