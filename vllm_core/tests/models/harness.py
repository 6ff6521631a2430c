"""Runs a model step by step through the seam, with blocks handed out by a few lines of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_core.backend import DeviceStep, Executable, HostStep, Program, Runtime, StepLayout
from vllm_core.backend.step import scrap_params
from vllm_core.models import ModelSpec, kv_groups
from vllm_core.models import decoder as model
from vllm_core.ops import NUM_COLUMNS, BucketKey, DeviceState, Features, HostArray, StepInput

NUM_ROWS = 3


@dataclass
class Row:
    """What the host knows of one row."""

    num_tokens: int = 0
    columns: list[dict[int, int]] = field(default_factory=list)
    """Per group: column -> block."""


class Harness:
    """One model on one runtime. Block ids come shuffled, and return when a window has passed."""

    def __init__(
        self,
        runtime: Runtime,
        spec: ModelSpec,
        params: Any,
        *,
        block_tokens: int = 4,
        num_blocks: int = 48,
        max_len: int = 64,
        max_tokens: int = 32,
        max_rows: int = 2,
    ) -> None:
        self.runtime, self.spec, self.params = runtime, spec, params
        self.size, self.max_tokens, self.max_rows = block_tokens, max_tokens, max_rows
        self.groups = kv_groups(spec, block_tokens)
        self.width = -(-max_len // block_tokens)
        self.num_blocks = dict.fromkeys(sorted({group.pool for group in self.groups}), num_blocks)
        self._compiled: dict[BucketKey, tuple[StepLayout, Executable]] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets every sequence, with a cache that was never written."""
        self.kv = self.runtime.attention.alloc(self.groups, self.num_blocks)
        shuffle = np.random.default_rng(0).permutation
        self.free = {
            pool: list(map(int, 1 + shuffle(count - 1))) for pool, count in self.num_blocks.items()
        }
        self.sequences: dict[int, Row] = {}
        self.state = self._new_state()

    def _new_state(self) -> DeviceState:
        ops, rows = self.runtime.ops, NUM_ROWS + 1
        return DeviceState(
            tables=self.runtime.block_tables.alloc(NUM_ROWS, (self.width,) * len(self.groups)),
            num_tokens=ops.full((rows,), 0, "int32"),
            last_token=ops.full((rows,), 0, "int32"),
            params=ops.full((rows, NUM_COLUMNS), 0, "int32"),
            history=ops.full((1, 1), 0, "int32"),
            bias=ops.full((1, self.spec.vocab_size), 0, "float32"),
        )

    def step(
        self, work: Mapping[int, Sequence[int]], keep_hidden: bool = True
    ) -> dict[int, HostArray]:
        """Computes the tokens of each row; -> logits [n, V] of these by row, or of the last."""
        rows = sorted(work, key=lambda row: (len(work[row]) > 1, row))
        lengths = [len(work[row]) for row in rows]
        key = self._key(sum(lengths), len(rows), keep_hidden)
        layout, run = self._executable(key)
        device_step = self._upload(layout, rows, work)
        results = run(self.params, self.state, self.kv, device_step)
        self.state, self.kv = results[:2]
        last, *kept = self.runtime.fetch(results[2:]).wait()
        for row in rows:
            self._release(self.sequences[row])
        if not keep_hidden:
            return {row: last[place][None] for place, row in enumerate(rows)}
        ends = np.cumsum(lengths)
        found = {row: kept[0][end - n : end] for row, n, end in zip(rows, lengths, ends)}
        for place, row in enumerate(rows):
            np.testing.assert_allclose(last[place], found[row][-1], rtol=0, atol=2e-5)
        return found

    def _key(self, num_tokens: int, num_rows: int, keep_hidden: bool) -> BucketKey:
        if self.runtime.caps.static_shapes:  # one shape, so one compilation
            num_tokens, num_rows = self.max_tokens, self.max_rows
        return BucketKey(
            num_tokens,
            num_rows,
            (self.width,) * len(self.groups),
            Features(keep_hidden=keep_hidden),
        )

    def _executable(self, key: BucketKey) -> tuple[StepLayout, Executable]:
        if key not in self._compiled:
            layout = StepLayout(key, NUM_ROWS, 0, 0, (self.size,) * len(self.groups))
            program = Program("step", self._program(key, layout), consumes=(1, 2))
            self._compiled[key] = layout, self.runtime.compile(program, key)
        return self._compiled[key]

    def _program(self, key: BucketKey, layout: StepLayout) -> Any:
        device, spec, groups = self.runtime.device, self.spec, self.groups
        ops = device.ops

        def fn(params: Any, state: DeviceState, kv: Any, device_step: DeviceStep) -> Any:
            step: StepInput = layout.unpack(device_step.buffer)
            view, state = ops.expand(
                device.block_tables, state, step, layout.block_tokens, spec.vocab_size
            )
            plans = device.attention.plan(
                state, view, step, key, device_step.host_part, spec.attention_specs, groups
            )
            hidden, kept, kv = model.forward(
                device, spec, params, kv, step, view, plans, key.features.keep_hidden
            )
            nothing = ops.full((key.rows, 1), -1, "int32")
            _, state = ops.advance(state, step, view, nothing)
            last = model.logits(device, spec, params, hidden)
            if kept is None:
                return state, kv, last
            return state, kv, last, model.logits(device, spec, params, kept)

        return fn

    def _upload(
        self, layout: StepLayout, rows: Sequence[int], work: Mapping[int, Sequence[int]]
    ) -> DeviceStep:
        buffer = np.array(layout.template())
        v = layout.views(buffer)
        num_resets, at, changes = 0, 0, [0] * len(self.groups)
        for place, row in enumerate(rows):
            tokens = work[row]
            if row not in self.sequences:
                self.sequences[row] = Row(columns=[{} for _ in self.groups])
                v["resets"][num_resets, :2] = row, 0
                v["resets"][num_resets, 2:] = scrap_params(0, 0)
                num_resets += 1
            sequence = self.sequences[row]
            v["row"][place] = row
            v["token_ids"][at : at + len(tokens)] = tokens
            at += len(tokens)
            v["query_start"][place + 1 :] = at
            v["logit_rows"][place] = at - 1, place
            sequence.num_tokens += len(tokens)
            for g, changed in enumerate(self._cover(sequence)):
                for column, block in changed:
                    v[f"table_changes{g}"][changes[g]] = row, column, block
                    changes[g] += 1
        lengths = np.array([len(work[row]) for row in rows])
        num_decode = int((lengths == 1).sum())
        v["split"][:] = split = (num_decode, num_decode, len(rows))
        seq_len = np.array([self.sequences[row].num_tokens for row in rows])
        return self.runtime.upload(buffer, HostStep(lengths, seq_len, split), layout.key)

    def _cover(self, sequence: Row) -> list[list[tuple[int, int]]]:
        """New cells (column, block) per group for the tokens of the sequence."""
        needed = range(-(-sequence.num_tokens // self.size))
        out: list[list[tuple[int, int]]] = []
        for group, own in zip(self.groups, sequence.columns):
            new = [(c, self.free[group.pool].pop()) for c in needed if c > max(own, default=-1)]
            out.append(new)
            own.update(new)
        return out

    def _release(self, sequence: Row) -> None:
        """Blocks that no later token can see go to others at once; the table still names them."""
        for group, own in zip(self.groups, sequence.columns):
            if group.spec.window is None:
                continue
            first = sequence.num_tokens - group.spec.window + 1
            for column in [c for c in own if (c + 1) * self.size <= first and own[c]]:
                self.free[group.pool].append(own[column])
                own[column] = 0
