"""The programs of a model on a device: pure functions that a runtime compiles once per bucket.

Knows: what is traced together. Does not know: frameworks, scheduling.
"""

from __future__ import annotations

from functools import partial

from vllm_core.backend import KV, Device, DeviceStep, KVGroup, Program, StepLayout
from vllm_core.models import decoder
from vllm_core.models.decoder import Params
from vllm_core.models.spec import ModelSpec
from vllm_core.ops import Array, Changes, DeviceState, StepResult
from vllm_core.runner.finish import finish, score


def step_program(
    device: Device, spec: ModelSpec, groups: tuple[KVGroup, ...], layout: StepLayout, workspace: int
) -> Program:
    """step(params, state, kv, device_step) -> (state, kv, StepResult, hidden [T, H] or None)."""

    def run(
        params: Params, state: DeviceState, kv: KV, device_step: DeviceStep
    ) -> tuple[DeviceState, KV, StepResult, Array | None]:
        key = layout.key
        step = layout.unpack(device_step.buffer)
        view, state = device.ops.expand(
            device.block_tables, state, step, layout.block_tokens, spec.vocab_size
        )
        plans = device.attention.plan(
            state, view, step, key, device_step.host_part, spec.attention_specs, groups
        )
        hidden, kept, kv = decoder.forward(
            device, spec, params, kv, step, view, plans, key.features.keep_hidden
        )
        result, state = finish(device, spec, params, hidden, state, step, view, key.features)
        return state, kv, result, kept

    return Program("step", run, consumes=(1, 2), num_results=2, workspace=workspace)


def apply_program(device: Device, num_groups: int) -> Program:
    """apply(state, tables [G, C, 3], history [C, 3]) -> (state,)."""

    def run(state: DeviceState, tables: Array, history: Array) -> tuple[DeviceState]:
        changes = Changes(tuple(tables[g] for g in range(num_groups)), history)
        return (device.ops.apply(device.block_tables, state, changes),)

    return Program("apply", run, consumes=(0,), num_results=0)


def bias_program(device: Device) -> Program:
    """set_bias(state, slot [1], values [1, V]) -> (state,)."""

    def run(state: DeviceState, slot: Array, values: Array) -> tuple[DeviceState]:
        return (state._replace(bias=device.ops.put(state.bias, (slot,), values)),)

    return Program("set_bias", run, consumes=(0,), num_results=0)


def score_program(device: Device, spec: ModelSpec, count: int) -> Program:
    """score(params, hidden [T, H], index [n], targets [n]) -> (Logprobs,)."""
    return Program("score", partial(score, device, spec, count), num_results=1)
