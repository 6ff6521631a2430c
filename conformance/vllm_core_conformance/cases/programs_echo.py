"""A tiny language model whose every token is known beforehand, run through the whole seam.

A token at position i looks up one position of its own sequence, (5 id + 3) mod (i + 1), through the
paged cache; what stands there names its successor, and that is drawn. Keys, queries and values are
rows of a Hadamard code, so the lookup is exact in every dtype, and a wrong token tells which
position, row, step or parameters it came from.

Knows: the seam, packing of steps, the answer. Does not know: which programs hurt (cases).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import (
    APPLY_ROWS,
    AttentionSpec,
    DeviceStep,
    HostStep,
    KVFormat,
    KVGroup,
    StepLayout,
)
from vllm_core.backend.step import scrap_params
from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, Changes, Column, DeviceState, Features, Param, StepResult
from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling, wide

Numbers = NDArray[Any]

VOCAB = 64
POSITIONS = 64
"""Longest sequence: one code word each."""
DIM, Q_HEADS, KV_HEADS, LAYERS, LAYER = 32, 4, 2, 2, 1
ROWS, LIVE_ROWS = 4, 6
"""S and N."""
SMALL, LARGE = 8, 48
"""T of the two buckets that are asked for; devices with static shapes may pad further."""
BIAS_SLOTS, HISTORY_SLOTS = 2, 1
FEATURES = Features(bias=True)
FORCE = 1e4
"""A bias that beats every logit (at most 128)."""
GARBAGE = -(2**20)


def looked_up(token: int, position: int) -> int:
    """Which position of its sequence a token looks up."""
    return (5 * token + 3) % (position + 1)


def code_words() -> Numbers:
    """[64, 32] of +-1: any two are orthogonal or opposite."""
    square = np.ones((1, 1))
    while len(square) < DIM:
        square = np.block([[square, square], [square, -square]])
    return np.concatenate((square, -square))


@dataclass(frozen=True)
class Weights:
    """The parameters on the device, and what they make of a token."""

    successor: Numbers
    """[V] a permutation: what is drawn when this token is found."""
    params: dict[str, Param]
    host: dict[str, Numbers]

    @staticmethod
    def make(target: Target, rng: np.random.Generator) -> Weights:
        codes, group = code_words(), Q_HEADS // KV_HEADS
        place = [codes[rng.permutation(POSITIONS)] for _ in range(KV_HEADS)]
        token = [codes[rng.permutation(VOCAB)] for _ in range(KV_HEADS)]
        successor = rng.permutation(VOCAB)
        spread = [i // group for i in range(Q_HEADS)]
        head = np.zeros((VOCAB, Q_HEADS * DIM))
        head[successor] = np.concatenate([token[i] for i in spread], 1)
        host = {
            "key": np.concatenate(place, 1),
            "query": 24 * np.concatenate([place[i] for i in spread], 1),
            "value": np.concatenate(token, 1),
            "head": head,
        }
        roles = {name: "linear" if name == "head" else "embedding" for name in host}
        params = {name: target.param(roles[name], {"weight": x}, name) for name, x in host.items()}
        return Weights(successor, params, host)


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


class Echo:
    """The model for one target: shapes, layouts, programs. Nothing here depends on a seed."""

    def __init__(self, target: Target) -> None:
        self.target, self.runtime = target, target.runtime
        scale = 0.2
        self.spec = AttentionSpec(
            Q_HEADS, KV_HEADS, DIM, DIM, scale, KVFormat(target.dtype), group=0
        )
        with calling("block_tokens"):
            offered = self.runtime.attention.block_tokens(self.spec)
        self.block_tokens = 8 if 8 in offered else min(offered)
        self.width = max(3, -(-POSITIONS // self.block_tokens))
        self.groups = (KVGroup(0, "full", self.block_tokens, LAYERS, self.spec, 0),)
        self.num_blocks = (LIVE_ROWS + 2) * self.width + 1
        with calling("buckets"):
            self.policy = self.runtime.buckets(LARGE, ROWS, self.width)

    @staticmethod
    def of(target: Target) -> Echo:
        if "echo" not in target.memo:
            target.memo["echo"] = Echo(target)
        found: Echo = target.memo["echo"]
        return found

    def layout(self, tokens: int, rows: int = ROWS) -> StepLayout:
        wanted = BucketKey(tokens, rows, (self.width,), FEATURES)
        key = self.policy.cover(wanted)
        if key is None:
            raise NotSupported(f"no bucket covers {wanted}, which is within what was announced")
        return StepLayout(key, LIVE_ROWS, HISTORY_SLOTS, BIAS_SLOTS, (self.block_tokens,))

    def alloc(self) -> Any:
        with calling("alloc"):
            return self.runtime.attention.alloc(self.groups, {0: self.num_blocks})

    def new_state(self) -> DeviceState:
        ops, rows = self.target.ops, LIVE_ROWS + 1
        scrap = scrap_params(HISTORY_SLOTS, BIAS_SLOTS)
        with calling("making a device state"):
            return DeviceState(
                tables=self.runtime.block_tables.alloc(LIVE_ROWS, (self.width,)),
                num_tokens=ops.full((rows,), 0, "int32"),
                last_token=ops.full((rows,), 0, "int32"),
                params=ops.asarray(np.repeat(scrap[None], rows, 0)),
                history=ops.full((HISTORY_SLOTS + 1, POSITIONS), 0, "int32"),
                bias=ops.full((BIAS_SLOTS + 1, VOCAB), 0.0, "float32"),
            )

    def step(self, layout: StepLayout) -> Any:
        return self.target.compile(
            ("echo", layout.key),
            partial(self._step, layout),
            name="step",
            consumes=(1, 2),
            num_results=2,
            key=layout.key,
        )

    def _step(
        self, layout: StepLayout, params: Any, state: DeviceState, kv: Any, device_step: DeviceStep
    ) -> tuple[Any, ...]:
        ops, attention = self.runtime.ops, self.runtime.attention
        num_tokens, num_rows = layout.key.tokens, layout.key.rows
        step = layout.unpack(device_step.buffer)
        view, state = ops.expand(
            self.runtime.block_tables, state, step, layout.block_tokens, VOCAB
        )
        (plan,) = attention.plan(
            state, view, step, layout.key, device_step.host_part, (self.spec,), self.groups
        )
        place = (view.token_ids * 5 + 3) % (view.positions + 1)
        q = ops.embed(place, params["query"]).reshape(num_tokens, Q_HEADS, DIM)
        k = ops.embed(view.positions, params["key"]).reshape(num_tokens, KV_HEADS, DIM)
        v = ops.embed(view.token_ids, params["value"]).reshape(num_tokens, KV_HEADS, DIM)
        out, _, kv = attention.attend(kv, LAYER, q, k, v, plan)
        hidden = out.reshape(num_tokens, Q_HEADS * DIM)
        token, destination = step.logit_rows[:, 0], step.logit_rows[:, 1]
        drawn, fault = ops.sample(
            ops.logits(hidden[token], params["head"]),
            state.params[step.row],
            view.positions[token] + 1,
            state.history,
            state.bias,
            FEATURES,
        )
        draws = destination < num_rows
        tokens = ops.xp.where(draws, drawn, -1)[:, None]
        accepted, state = ops.advance(state, step, view, tokens)
        fault = ops.xp.where(draws, fault, 0)
        return state, kv, StepResult(tokens, accepted, fault, None), hidden

    def apply(self) -> Any:
        def fn(state: DeviceState, tables: Any, history: Any) -> tuple[DeviceState]:
            ops = self.runtime.ops
            changes = Changes((tables[0],), history)
            return (ops.apply(self.runtime.block_tables, state, changes),)

        return self.target.compile(
            "echo apply", fn, name="apply", consumes=(0,), num_results=0
        )

    def set_bias(self) -> Any:
        def fn(state: DeviceState, slot: Any, values: Any) -> tuple[DeviceState]:
            return (state._replace(bias=self.runtime.ops.put(state.bias, (slot,), values)),)

        return self.target.compile(
            "echo set_bias", fn, name="set_bias", consumes=(0,), num_results=0
        )

    def score(self) -> Any:
        """score(params, hidden, index [ROWS]) -> the most likely token of each row of hidden."""

        def fn(params: Any, hidden: Any, index: Any) -> tuple[Any]:
            logits = self.runtime.ops.logits(hidden[index], params["head"])
            return (self.runtime.ops.xp.argmax(logits, -1),)

        return self.target.compile("echo score", fn, name="score", num_results=1)


class Session:
    """One state and one cache, and the sequences in them."""

    def __init__(self, target: Target, rng: np.random.Generator) -> None:
        self.echo, self.target, self.rng = Echo.of(target), target, rng
        self.kv, self.state = self.echo.alloc(), self.echo.new_state()
        self.free = [int(i) for i in rng.permutation(np.arange(1, self.echo.num_blocks))]
        self.sequences: dict[int, Request] = {}
        self.forced: dict[int, int] = {}
        """Bias slot -> the only token it lets through."""
        self.log: list[Pending] = []

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
        host = HostStep(
            np.array([count for _, count in work], np.int32),
            np.array([self.sequences[row].computed for row, _ in work], np.int32),
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
        """A step of these (row, tokens), padded to the bucket of `tokens` and `rows`; nothing is
        waited for."""
        layout = self.echo.layout(tokens, rows)
        buffer, host, ordered = self.pack(work, layout)
        return self.run(ordered, self.upload(buffer, host, layout), weights, layout)

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
        if result is None:
            result = self.target.fetch(pending.result)
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
        others = [w for w in {id(p.weights): p.weights for p in self.log}.values()]
        if 0 <= want and any(w.successor[inverse[want]] == got for w in others):
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
        drawn = [
            r for r in rows if len(self.sequences[r].tokens) > self.sequences[r].prompt_len
        ]
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
            found = self.target.runtime.attention.export_blocks(
                self.kv, self.echo.groups[0], ids
            )

        def own(x: Any) -> Numbers:
            layer = wide(x)[LAYER].reshape(len(ids), self.echo.block_tokens, -1)
            return np.concatenate((np.zeros_like(layer[:1]), layer))

        return {name: own(found[name]) for name in ("k", "v")}

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
