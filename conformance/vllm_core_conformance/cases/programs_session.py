"""Requests of the tiny model (programs_echo) on one device state: packs steps, runs them, judges.

Knows: packing of steps, who owns which block, what each row must draw. Does not know: which
programs hurt (cases).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import APPLY_ROWS, DeviceStep, HostStep, StepConstraints, StepLayout
from vllm_core.ops import Column, DeviceState, StepResult
from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.programs_echo import (
    BIAS_SLOTS,
    HISTORY_SLOTS,
    LARGE,
    LAYER,
    LIVE_ROWS,
    ROWS,
    SMALL,
    VOCAB,
    Echo,
    Weights,
    looked_up,
)
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling, wide

Numbers = NDArray[Any]

FORCE = 1e4
"""A bias that beats every logit (at most 128)."""
GARBAGE = -(2**20)


@dataclass
class Request:
    """One request, as the host knows it."""

    tokens: list[int]
    """The prompt and everything drawn."""
    prompt_len: int
    bias_slot: int = BIAS_SLOTS
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    is_reset: bool = False
    context: list[int] = field(default_factory=list)
    """What the cache holds at each position; not the own tokens where cells were moved."""


@dataclass
class Pending:
    """A submitted step: its results on the device, and what they must be."""

    result: Any
    hidden: Any
    tokens: Numbers
    """[S] expected draw of each row of the step, -1 where there is none."""
    rows: list[int]
    found: Numbers
    """[t] the token that each token of the step must find."""
    weights: Weights
    number: int
    earlier: tuple[Pending, ...] = ()
    """Steps that went before it, where the declared limits made several of one."""


Work = list[tuple[int, int]]
"""(row, tokens) of each row of a step."""


class Session:
    """One state and one cache, and the sequences in them."""

    def __init__(self, target: Target, rng: np.random.Generator) -> None:
        self.echo, self.target, self.rng = Echo.of(target), target, rng
        self.kv, self.state = self.echo.alloc(), self.echo.new_state()
        last = self.echo.num_blocks - 1
        ends = [1, 2, 3, last - 2, last - 1, last]  # what a stray write or read hits is live
        self.free = [int(i) for i in rng.permutation(np.arange(4, last - 2))]
        self.free += [int(i) for i in rng.permutation(ends)]
        self.sequences: dict[int, Request] = {}
        self.forced: dict[int, int] = {}
        """Bias slot -> the only token it lets through."""
        self.log: list[Pending] = []
        self.rivals: list[Weights] = []
        """Parameters of other calls, which a token may betray."""

    # ---- the host's side
    def admit(self, row: int, length: int, bias_slot: int = BIAS_SLOTS) -> Request:
        prompt = [int(t) for t in self.rng.integers(0, VOCAB, length)]
        self.sequences[row] = Request(prompt, length, bias_slot)
        return self.sequences[row]

    def finish(self, row: int) -> None:
        self.free[:0] = self.sequences.pop(row).blocks  # taken again at the very end

    def pack(self, work: Sequence[tuple[int, int]], layout: StepLayout) -> tuple[Any, ...]:
        """(row, tokens) of each row -> packed buffer, HostStep, the rows in order; the sequences
        move on."""
        work = sorted(work, key=lambda item: item[1] > 1)
        buffer = np.array(layout.template())
        v = layout.views(buffer)
        at, changes, resets = 0, 0, 0
        for place, (row, count) in enumerate(work):
            sequence = self.sequences[row]
            begin, end = sequence.computed, sequence.computed + count
            if not sequence.is_reset:
                v["resets"][resets, :2] = row, 0
                v["resets"][resets, 2 + Column.BIAS_SLOT] = sequence.bias_slot
                sequence.is_reset, resets = True, resets + 1
            while len(sequence.blocks) * self.echo.block_tokens < end:
                block = self.free.pop()
                v["table_changes0"][changes] = row, len(sequence.blocks), block
                sequence.blocks.append(block)
                changes += 1
            ids = sequence.tokens[begin:end]
            sequence.context[begin:] = ids
            v["row"][place] = row
            is_drawn = count == 1 and begin >= sequence.prompt_len
            v["token_ids"][at : at + count] = [-1] if is_drawn else ids
            at += count
            v["query_start"][place + 1] = at
            v["logit_rows"][place] = at - 1, layout.key.rows
            if end == len(sequence.tokens):
                v["logit_rows"][place, 1] = place
            sequence.computed = end
        v["query_start"][len(work) + 1 :] = at
        single = sum(count == 1 for _, count in work)
        v["split"][:] = split = (single, single, len(work))
        host = HostStep(  # in 64 bits, as the engine has them
            np.array([count for _, count in work], np.int64),
            np.array([self.sequences[row].computed for row, _ in work], np.int64),
            split,
        )
        return buffer, host, work

    def expect(
        self, work: Sequence[tuple[int, int]], weights: Weights, num_rows: int
    ) -> tuple[Numbers, Numbers]:
        """What each row must draw, -1 padded, and what each token must find; draws join the
        sequences."""
        drawn, found = np.full(num_rows, -1), []
        for place, (row, count) in enumerate(work):
            s = self.sequences[row]
            for position in range(s.computed - count, s.computed):
                found.append(s.context[looked_up(s.context[position], position)])
            if s.computed == len(s.tokens):
                token = self.forced.get(s.bias_slot, int(weights.successor[found[-1]]))
                s.tokens.append(token)
                drawn[place] = token
        return drawn, np.array(found)

    # ---- the device's side
    def upload(self, buffer: Numbers, host: HostStep, layout: StepLayout) -> DeviceStep:
        with calling("upload"):
            step = self.target.runtime.upload(buffer, host, layout.key)
        buffer[:] = GARBAGE  # the array may be reused on return
        return step

    def submit(
        self,
        work: Sequence[tuple[int, int]],
        weights: Weights,
        tokens: int = SMALL,
        rows: int = ROWS,
    ) -> Pending:
        """A step of these (row, tokens), padded to the bucket of `tokens` and `rows`, or as many as
        the declared limits make of it; nothing is waited for."""
        earlier: tuple[Pending, ...] = ()
        for part in self.parts(work):
            count = sum(tokens for _, tokens in part)
            layout = self.echo.layout(tokens if count <= tokens else max(LARGE, count), rows)
            buffer, host, ordered = self.pack(part, layout)
            pending = self.run(ordered, self.upload(buffer, host, layout), weights, layout)
            pending.earlier, earlier = earlier, (*earlier, pending)
        return earlier[-1]

    def parts(self, work: Sequence[tuple[int, int]]) -> list[Work]:
        """The same work as steps that the declared limits allow; one where there are none."""
        limits, parts = self.target.constraints(), []
        chunks = [chunk for item in work for chunk in self._chunks(*item, limits)]
        while chunks:
            part: Work = []
            left: Work = []
            for row, count in chunks:
                is_next = all(row != other for other, _ in (*part, *left))
                is_next &= not part or self._fits(part, row, count, limits)
                (part if is_next else left).append((row, count))
            parts.append(part)
            chunks = left
        return parts

    def _chunks(self, row: int, count: int, limits: StepConstraints) -> Work:
        """Tokens of one row: chunks of the declared multiple, but for the last of a prompt."""
        request = self.sequences[row]
        rest, multiple = len(request.tokens) - request.computed, limits.chunk_multiple
        count = min(count, rest)
        if count < rest:
            count = min(rest, -(-count // multiple) * multiple)
        most = limits.max_tokens or count
        most = max(most - most % multiple, multiple) if count > most else count
        return [(row, min(most, count - at)) for at in range(0, count, most)]

    def _fits(self, part: Work, row: int, count: int, limits: StepConstraints) -> bool:
        """Without mixed_ok, rows that decode, prompts of one token and longer ones stay apart."""

        def kind(item: tuple[int, int]) -> tuple[bool, bool]:
            request = self.sequences[item[0]]
            return item[1] > 1, request.computed >= request.prompt_len

        num_prefills = sum(tokens > 1 for _, tokens in part) + (count > 1)
        total = sum(tokens for _, tokens in part) + count
        return (
            total <= (limits.max_tokens or total)
            and num_prefills <= (limits.max_prefills or num_prefills)
            and (limits.mixed_ok or all(kind(item) == kind((row, count)) for item in part))
        )

    def run(
        self,
        work: Sequence[tuple[int, int]],
        device_step: DeviceStep,
        weights: Weights,
        layout: StepLayout,
    ) -> Pending:
        drawn, found = self.expect(work, weights, layout.key.rows)
        program = self.echo.step(layout)
        with calling("the step program"):
            self.state, self.kv, result, hidden = program(
                weights.params, self.state, self.kv, device_step
            )
        if getattr(self.state, "_fields", None) != DeviceState._fields:
            raise Failed(
                "a step consumes state and cache, in this order, but the first value that came "
                f"back is a {type(self.state).__name__} and no device state"
            )
        rows = [row for row, _ in work]
        self.log.append(Pending(result, hidden, drawn, rows, found, weights, len(self.log)))
        return self.log[-1]

    def move_cells(self, row: int, source: int, columns: Sequence[int]) -> None:
        """Table cells of `row` now hold the blocks of `source`, through the program `apply`."""
        mine, theirs, size = self.sequences[row], self.sequences[source], self.echo.block_tokens
        tables = np.zeros((1, APPLY_ROWS, 3), np.int32)
        tables[:, :, 0] = LIVE_ROWS
        history = np.zeros((APPLY_ROWS, 3), np.int32)
        history[:, 0] = HISTORY_SLOTS
        for i, column in enumerate(columns):
            tables[0, i] = row, column, theirs.blocks[column]
            here = slice(column * size, (column + 1) * size)
            mine.context[here] = theirs.context[here]
        arrays = self.target.array(tables), self.target.array(history)
        with calling("the program apply"):
            (self.state,) = self.echo.apply()(self.state, *arrays)

    def force(self, slot: int, token: int) -> None:
        """Rows of this bias slot draw `token` from now on, through the program `set_bias`."""
        values = np.zeros((1, VOCAB), np.float32)
        values[0, token] = FORCE
        where = self.target.array(np.array([slot], np.int32))
        array = self.target.array(values, "float32")
        with calling("the program set_bias"):
            (self.state,) = self.echo.set_bias()(self.state, where, array)
        self.forced[slot] = token

    # ---- judgement
    def check(self, pending: Pending, result: Any = None, when: str = "") -> Evidence:
        """The step's result on the host is what it must be."""
        evidence = Evidence()
        for earlier in pending.earlier:
            evidence += self._check_one(earlier, None, when)
        evidence += self._check_one(pending, result, when)
        return evidence

    def _check_one(self, pending: Pending, result: Any, when: str) -> Evidence:
        if result is None:
            result = self.target.fetch(pending.result)
        if getattr(result, "_fields", None) != StepResult._fields:
            raise Failed(
                f"step {pending.number}{when}: a StepResult was fetched as a "
                f"{type(result).__name__} without its fields"
            )
        got = np.asarray(result.tokens)
        if got.shape != (len(pending.tokens), 1):
            raise Failed(
                f"step {pending.number}{when}: tokens have shape {list(got.shape)}, expected "
                f"{[len(pending.tokens), 1]}"
            )
        wrong = np.nonzero(got[:, 0] != pending.tokens)[0]
        if len(wrong):
            place = int(wrong[0])
            raise Failed(
                f"step {pending.number}{when}: {len(wrong)} of {len(got)} rows drew another token; "
                + self._explain(pending, place, int(got[place, 0])),
                got=got[:, 0].tolist(),
                expected=pending.tokens.tolist(),
            )
        for name in ("num_accepted", "fault"):
            values = np.asarray(getattr(result, name))
            if values.shape != pending.tokens.shape or values.any():
                raise Failed(
                    f"step {pending.number}{when}: {name} is {values.tolist()}, expected zeros"
                )
        return Evidence(checks=3 * len(got))

    def check_padding(self, pending: Pending, when: str = "") -> Evidence:
        """The step's hidden states, which attention gave, are 0 behind its last token."""
        hidden = wide(self.target.fetch((pending.hidden,))[0])[len(pending.found) :] + 0.0
        return require_equal(
            hidden,
            np.zeros_like(hidden),
            f"attention's output for padding tokens of step {pending.number}{when}",
            axes=("padding token", "lane"),
        )

    def _explain(self, pending: Pending, place: int, got: int) -> str:
        """Which mistake would have drawn this token."""
        want = int(pending.tokens[place])
        if place >= len(pending.rows):
            return f"row {place} of the step is padding and must draw -1, got {got}"
        row = pending.rows[place]
        text = f"row {place} of the step (row {row} for life) drew {got}, expected {want}"
        inverse = np.argsort(pending.weights.successor)
        context = self.sequences[row].context if row in self.sequences else []
        for earlier in reversed(self.log[: pending.number]):
            if place < len(earlier.tokens) and earlier.tokens[place] == got:
                text += f"; step {earlier.number} drew that in the same place: an old result?"
                break
        if want >= 0 and any(w.successor[inverse[want]] == got for w in self.rivals):
            text += "; the parameters of another call would have drawn it"
        if 0 <= got < VOCAB:
            at = [i for i, token in enumerate(context) if token == inverse[got]]
            if at:
                text += f"; its sequence holds what leads there at position {at[0]}"
            for other, sequence in self.sequences.items():
                if other != row and inverse[got] in sequence.context:
                    text += f"; row {other} holds it at {sequence.context.index(inverse[got])}"
                    break
        return text

    def check_state(self, when: str = "") -> Evidence:
        """Lengths and last tokens of every row of a sequence."""
        fetched = self.target.fetch((self.state.num_tokens, self.state.last_token))
        rows = sorted(r for r, s in self.sequences.items() if s.is_reset)
        lengths = np.array([self.sequences[r].computed for r in rows], np.int64)
        evidence = require_equal(
            np.asarray(fetched[0])[rows],
            lengths,
            f"lengths (num_tokens) of rows {rows} in the state{when}",
            axes=("place",),
        )
        drawn = [r for r in rows if len(self.sequences[r].tokens) > self.sequences[r].prompt_len]
        last = np.array([self.sequences[r].tokens[-1] for r in drawn], np.int64)
        evidence += require_equal(
            np.asarray(fetched[1])[drawn],
            last,
            f"last tokens of rows {drawn} in the state{when}",
            axes=("place",),
        )
        return evidence

    def read_cache(self) -> dict[str, Numbers]:
        """{"k", "v"}: [block, BT, Hkv * D] of the layer that is used; block 0 as zeros."""
        ids = list(range(1, self.echo.num_blocks))
        with calling("export_blocks"):
            found = self.target.runtime.attention.export_blocks(self.kv, self.echo.groups[0], ids)

        def own(x: Any) -> Numbers:
            layer = wide(x)[LAYER].reshape(len(ids), self.echo.block_tokens, -1)
            return np.concatenate((np.zeros_like(layer[:1]), layer))

        return {name: own(found[name]) for name in ("k", "v")}

    def scramble(self) -> None:
        """Every slot that holds no computed token gets numbers of its own, in all layers."""
        ids, size = list(range(1, self.echo.num_blocks)), self.echo.block_tokens
        attention, group = self.target.runtime.attention, self.echo.groups[0]
        with calling("export_blocks"):
            found = attention.export_blocks(self.kv, group, ids)
        free = np.ones((len(ids), size), bool)
        for request in self.sequences.values():
            position = np.arange(request.computed)
            free[np.array(request.blocks, np.int64)[position // size] - 1, position % size] = False
        arrays = {name: np.array(x) for name, x in found.items()}
        for x in arrays.values():
            x[:, free] = self.rng.integers(-100, 100, x[:, free].shape)
        with calling("import_blocks"):
            self.kv = attention.import_blocks(self.kv, group, ids, arrays)

    def check_cache(self, weights: Weights, when: str = "") -> Evidence:
        """Every computed token's K and V lie in the block and slot of its sequence, bit for bit."""
        cache, size = self.read_cache(), self.echo.block_tokens
        evidence = Evidence()
        for row, sequence in self.sequences.items():
            position = np.arange(sequence.computed)
            blocks = np.array(sequence.blocks, np.int64)[position // size]
            for name, table, index in (
                ("k", weights.host["key"], position),
                ("v", weights.host["value"], np.array(sequence.tokens)[: sequence.computed]),
            ):
                evidence += require_equal(
                    cache[name][blocks, position % size],
                    table[index],
                    f"{name.upper()} of row {row} in the cache{when}",
                    axes=("position", "lane"),
                )
        return evidence


def healthy(target: Target, seed: int, after: str) -> Evidence:
    """A prompt and two decoding steps come out right; `after` says what went before."""
    rng = np.random.default_rng([seed, 77])
    weights = Weights.make(target, rng)
    session = Session(target, rng)
    session.admit(2, 5)
    session.admit(4, 1)
    evidence = Evidence()
    for work in ([(2, 5), (4, 1)], [(4, 1), (2, 1)], [(2, 1), (4, 1)]):
        evidence += session.check(session.submit(work, weights), when=f" after {after}")
    return evidence
