"""From hidden states to tokens: logits, draw, log-probabilities, advance.

Knows: the order. Does not know: how each op is computed, who asked.
"""

from __future__ import annotations

from vllm_core.backend import Device
from vllm_core.models import decoder
from vllm_core.models.decoder import Params
from vllm_core.models.spec import ModelSpec
from vllm_core.ops import (
    Array,
    DeviceState,
    Features,
    Logprobs,
    StepInput,
    StepResult,
    StepView,
)


def finish(
    device: Device,
    spec: ModelSpec,
    params: Params,
    hidden: Array,
    state: DeviceState,
    step: StepInput,
    view: StepView,
    features: Features,
) -> tuple[StepResult, DeviceState]:
    """hidden [S, H] of each row's last token -> what the host gets, and the state moved on.

    Without drafts the destination of a row's logits is the row itself; S where it draws nothing.
    """
    ops, xp = device.ops, device.ops.xp
    num_rows = step.row.shape[0]
    token, destination = step.logit_rows[:, 0], step.logit_rows[:, 1]
    draws = destination < num_rows
    logits = decoder.logits(device, spec, params, hidden)
    drawn, fault = ops.sample(
        logits,
        state.params[step.row],
        view.positions[token] + 1,
        state.history,
        state.bias,
        features,
    )
    logprobs = None
    if features.logprobs >= 0:
        logprobs = ops.logprobs(logits, drawn, features.logprobs)
    tokens = xp.where(draws, drawn, -1)[:, None]
    accepted, state = ops.advance(state, step, view, tokens)
    fault = xp.where(draws, fault, 0)
    return StepResult(tokens, accepted, fault, logprobs), state


def score(
    device: Device,
    spec: ModelSpec,
    count: int,
    params: Params,
    hidden: Array,
    index: Array,
    targets: Array,
) -> tuple[Logprobs]:
    """Log-probabilities of targets [n] under the logits of hidden[index]: the prompt's own
    tokens."""
    logits = decoder.logits(device, spec, params, hidden[index])
    return (device.ops.logprobs(logits, targets, count),)
