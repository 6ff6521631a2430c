"""Builds the step and calls the programs of one device; owns its parameters, state and cache.

Knows: buckets, programs, what is on the device. Does not know: requests, scheduling, text.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_core.backend import Executable, Fetch, KVGroup, Runtime, StepLayout
from vllm_core.backend.step import scrap_params
from vllm_core.models.decoder import Params
from vllm_core.models.spec import ModelSpec
from vllm_core.ops import BucketKey, DeviceState, Logprobs, StepResult
from vllm_core.plan import Plan, PromptTargets
from vllm_core.runner import memory, programs
from vllm_core.runner.batch import build_step, cover, exact_key, overflow

MAX_EAGER_BUCKETS = 512
"""Shapes remembered where any shape goes; a new one costs microseconds."""
SCORE_ROWS = 64
"""Prompt tokens scored in one call, where the device allows as many rows of logits."""


@dataclass(frozen=True)
class Sizes:
    """What fixes the shapes of state and steps."""

    num_rows: int
    max_tokens: int
    """Longest sequence with what runs ahead: columns of the tables cover it."""
    token_budget: int
    num_history_slots: int
    num_bias_slots: int
    num_blocks: dict[int, int]
    """By pool, the null block included."""


@dataclass(frozen=True)
class Bucket:
    """One compiled shape of the step."""

    layout: StepLayout
    run: Executable


class StepHandle:
    """A submitted step; `wait` brings its result to the host."""

    def __init__(self, result: Fetch, scores: list[tuple[PromptTargets, list[Fetch]]]) -> None:
        self._result, self._scores = result, scores

    def wait(self) -> tuple[StepResult, dict[int, Logprobs]]:
        """-> result, and by row of the plan the log-probabilities of its prompt tokens."""
        result: StepResult = self._result.wait()
        scores = {}
        for targets, fetches in self._scores:
            parts: list[Logprobs] = [fetch.wait()[0] for fetch in fetches]
            count, width = len(targets.targets), 1 + targets.count
            scores[targets.place] = Logprobs(
                np.concatenate([p.ids for p in parts])[:count, :width],
                np.concatenate([p.values for p in parts])[:count, :width],
                np.concatenate([p.rank for p in parts])[:count],
            )
        return result, scores


class ModelRunner:
    """One model on one device."""

    def __init__(
        self,
        runtime: Runtime,
        spec: ModelSpec,
        params: Params,
        groups: tuple[KVGroup, ...],
        sizes: Sizes,
    ) -> None:
        self.runtime, self.spec, self.params = runtime, spec, params
        self.groups, self.sizes = groups, sizes
        self.block_tokens = tuple(g.block_tokens for g in groups)
        self.widths = tuple(-(-sizes.max_tokens // size) for size in self.block_tokens)
        self.policy = runtime.buckets(sizes.token_budget, sizes.num_rows, max(self.widths))
        self._buckets: OrderedDict[BucketKey, Bucket] = OrderedDict()
        device = runtime.device
        self._apply = runtime.compile(programs.apply_program(device, len(groups)), None)
        self._set_bias = runtime.compile(programs.bias_program(device), None)
        self._score: dict[int, Executable] = {}
        self.num_bucket_misses = 0
        """Steps whose shape had to be compiled."""
        self.reset()

    def reset(self) -> None:
        """A fresh state and cache, for the start and after a program that failed."""
        self.kv = self.state = None
        self.kv = self.runtime.attention.alloc(self.groups, self.sizes.num_blocks)
        self.state = self._new_state()

    def _new_state(self) -> DeviceState:
        ops, sizes = self.runtime.ops, self.sizes
        rows = sizes.num_rows + 1
        scrap = scrap_params(sizes.num_history_slots, sizes.num_bias_slots)
        return DeviceState(
            tables=self.runtime.block_tables.alloc(sizes.num_rows, self.widths),
            num_tokens=ops.full((rows,), 0, "int32"),
            last_token=ops.full((rows,), 0, "int32"),
            params=ops.asarray(np.repeat(scrap[None], rows, 0)),
            history=ops.full((sizes.num_history_slots + 1, sizes.max_tokens), 0, "int32"),
            bias=ops.full((sizes.num_bias_slots + 1, self.spec.vocab_size), 0.0, "float32"),
        )

    def execute(self, plan: Plan) -> StepHandle:
        """Submits a step and returns at once where the device allows it."""
        bucket = self._bucket(cover(self.policy, exact_key(plan, self.block_tokens)))
        layout, ops = bucket.layout, self.runtime.ops
        for tables, history in overflow(plan, layout):
            (self.state,) = self._apply(self.state, ops.asarray(tables), ops.asarray(history))
        for slot, values in plan.bias_changes:
            where = ops.asarray(np.array([slot], np.int32))
            (self.state,) = self._set_bias(self.state, where, ops.asarray(values[None]))
        packed, host = build_step(plan, layout)
        device_step = self.runtime.upload(packed, host, layout.key)
        self.state, self.kv, result, hidden = bucket.run(
            self.params, self.state, self.kv, device_step
        )
        scores = [(t, self._score_prompt(hidden, t)) for t in plan.prompt_targets]
        return StepHandle(self.runtime.fetch(result), scores)

    def _score_prompt(self, hidden: Any, targets: PromptTargets) -> list[Fetch]:
        count = self.policy.cover_logprobs(targets.count)
        if count not in self._score:
            program = programs.score_program(self.runtime.device, self.spec, count)
            self._score[count] = self.runtime.compile(program, None)
        fetches, ops = [], self.runtime.ops
        rows = min(SCORE_ROWS, self.runtime.caps.max_logit_rows or SCORE_ROWS)
        for at in range(0, len(targets.targets), rows):
            part = targets.targets[at : at + rows]
            index, ids = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
            index[: len(part)] = targets.first + at + np.arange(len(part))
            ids[: len(part)] = part
            result = self._score[count](self.params, hidden, ops.asarray(index), ops.asarray(ids))
            fetches.append(self.runtime.fetch(result))
        return fetches

    def _bucket(self, key: BucketKey) -> Bucket:
        found = self._buckets.get(key)
        if found is None:
            found = self._buckets[key] = self._compile(key)
            self.num_bucket_misses += 1
            if not self.runtime.caps.static_shapes and len(self._buckets) > MAX_EAGER_BUCKETS:
                self._buckets.popitem(last=False)
        return found

    def _compile(self, key: BucketKey) -> Bucket:
        sizes = self.sizes
        layout = StepLayout(
            key, sizes.num_rows, sizes.num_history_slots, sizes.num_bias_slots, self.block_tokens
        )
        workspace = memory.workspace(self.spec, key, self.block_tokens, self.runtime.dtype)
        program = programs.step_program(
            self.runtime.device, self.spec, self.groups, layout, workspace
        )
        return Bucket(layout, self.runtime.compile(program, key))

    def close(self) -> None:
        """Lets go of everything on the device."""
        self.params, self.state, self.kv = {}, None, None
        self._buckets.clear()
        self.runtime.close()
