"""A tiny language model whose every token is known beforehand, run through the whole seam.

A token at position i looks up one position of its own sequence, (5 id + 3) mod (i + 1), through the
paged cache; what stands there names its successor, and that is drawn. Keys, queries and values are
rows of a Hadamard code, so the lookup is exact in every dtype, and a wrong token tells which
position, row, step or parameters it came from.

Knows: the model, its programs, the answer to one token. Does not know: requests, steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import (
    AttentionSpec,
    DeviceStep,
    KVFormat,
    KVGroup,
    StepLayout,
)
from vllm_core.backend.step import scrap_params
from vllm_core.ops import BucketKey, Changes, DeviceState, Features, Param, StepResult
from vllm_core_conformance.case import Failed
from vllm_core_conformance.target import Target, calling

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


class Echo:
    """The model for one target: shapes, layouts, programs. Nothing here depends on a seed."""

    def __init__(self, target: Target) -> None:
        self.target, self.runtime = target, target.runtime
        scale = 0.2
        self.spec = AttentionSpec(
            Q_HEADS, KV_HEADS, DIM, DIM, scale, KVFormat(target.dtype), group=0
        )
        offered = target.block_tokens(self.spec)
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
        most = self.target.constraints().max_tokens or tokens
        wanted = BucketKey(min(tokens, most), rows, (self.width,), FEATURES)
        key = self.policy.cover(wanted)
        if key is None:
            raise Failed(f"no bucket covers {wanted}, which is within what was announced")
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
        view, state = ops.expand(self.runtime.block_tables, state, step, layout.block_tokens, VOCAB)
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

        return self.target.compile("echo apply", fn, name="apply", consumes=(0,), num_results=0)

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
