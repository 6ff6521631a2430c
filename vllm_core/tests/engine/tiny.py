"""A tiny random model without files, engines over it, and a plain oracle of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vllm_core.backend import Runtime, StepConstraints
from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.engine.core import EngineCore
from vllm_core.engine.limits import Limits
from vllm_core.engine.request import Request, Sequence
from vllm_core.models import ModelSpec, kv_groups
from vllm_core.models.recipe import attention, number_layers
from vllm_core.models.spec import FFNSpec, LayerSpec, RopeSpec
from vllm_core.ops import HostArray, Logprobs, ParamSpec, Part, reference
from vllm_core.params import SamplingParams
from vllm_core.runner.memory import AHEAD
from vllm_core.runner.runner import ModelRunner, Sizes

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, FFN = 67, 32, 4, 2, 8, 48
EPS = 1e-5
EOS = (3,)
MAX_LEN = 48
NO_CONSTRAINTS = StepConstraints()

FULL = (None, None)
TWO_GROUPS = (None, 6)
"""One full layer and one with a window: two groups in one pool."""
TWO_POOLS = (None, 5, 5)
"""Unequal layer counts, so the groups cannot share a pool."""


def make_spec(dtype: str, windows: tuple[int | None, ...]) -> ModelSpec:
    layers = [
        LayerSpec(
            attention=attention((HEADS, KV_HEADS, DIM), dtype, scale=DIM**-0.5, window=window),
            attention_index=0,
            kv_layer=0,
            rope=0,
            ffn=FFNSpec(FFN, "silu", gated=True),
            norm="rms",
            eps=EPS,
        )
        for window in windows
    ]
    numbered, specs = number_layers(layers)
    frequency = 100.0 ** -(np.arange(DIM // 2) / (DIM // 2))
    return ModelSpec(
        architecture="Tiny",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        layers=numbered,
        attention_specs=specs,
        ropes=(RopeSpec(DIM, tuple(map(float, frequency)), 1.0),),
        norm="rms",
        eps=EPS,
        max_model_len=MAX_LEN,
        tied_embeddings=False,
    )


def make_weights(num_layers: int, sharpness: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Host arrays; `sharpness` scales the logits."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, size: int, scale: float = 1.0) -> HostArray:
        return rng.standard_normal((rows, size)) * scale * size**-0.5

    qkv = (HEADS + 2 * KV_HEADS) * DIM
    layers = [
        {
            "input_norm": 1 + 0.1 * rng.standard_normal(HIDDEN),
            "qkv": matrix(qkv, HIDDEN, 2.0),
            "output": matrix(HIDDEN, HEADS * DIM, 2.0),
            "ffn_norm": 1 + 0.1 * rng.standard_normal(HIDDEN),
            "gate_up": matrix(2 * FFN, HIDDEN, 1.5),
            "down": matrix(HIDDEN, FFN, 2.0),
        }
        for _ in range(num_layers)
    ]
    return {
        "embed": rng.standard_normal((VOCAB, HIDDEN)),
        "layers": layers,
        "norm": np.ones(HIDDEN),
        "head": matrix(VOCAB, HIDDEN, 3.0 * sharpness),
    }


def load(runtime: Runtime, spec: ModelSpec, weights: dict[str, Any]) -> dict[str, Any]:
    def one(name: str, array: HostArray) -> Any:
        role = "norm" if array.ndim == 1 else "embedding" if name == "embed" else "linear"
        part = Part("dense", {"weight": array}, array.shape[0])
        return runtime.load(ParamSpec(name, array.shape, role), [part])

    params = {name: one(name, weights[name]) for name in ("embed", "norm", "head")}
    layers = [{name: one(name, a) for name, a in layer.items()} for layer in weights["layers"]]
    params["layers"] = runtime.ops.stack_layers(layers, spec.layers)
    return params


def oracle_logits(
    weights: dict[str, Any], windows: tuple[int | None, ...], tokens: list[int]
) -> HostArray:
    """[T, V] of a whole sequence at once: no cache, no blocks, float64."""
    spec = make_spec("float64", windows)
    x = weights["embed"][tokens]
    count = len(tokens)
    positions = np.arange(count)
    table = reference.rope_table(positions, np.array(spec.ropes[0].inverse_frequency), 1.0)
    for layer, window in zip(weights["layers"], windows, strict=True):
        h = reference.linear(reference.rms_norm(x, layer["input_norm"], EPS), layer["qkv"])
        q, k, v = np.split(h, [HEADS * DIM, (HEADS + KV_HEADS) * DIM], axis=1)
        q = reference.rope(q.reshape(count, HEADS, DIM), *table)
        k = reference.rope(k.reshape(count, KV_HEADS, DIM), *table)
        v = v.reshape(count, KV_HEADS, DIM)
        out, _ = reference.attention(q, k, v, positions, scale=DIM**-0.5, window=window)
        x = x + reference.linear(out.reshape(count, -1), layer["output"])
        h = reference.linear(reference.rms_norm(x, layer["ffn_norm"], EPS), layer["gate_up"])
        gate, up = h[:, :FFN], h[:, FFN:]
        x = x + reference.linear(reference.activation(gate, "silu") * up, layer["down"])
    return reference.linear(reference.rms_norm(x, weights["norm"], EPS), weights["head"])


def log_softmax(logits: HostArray) -> HostArray:
    top = logits.max(-1, keepdims=True)
    result: HostArray = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return result


class Constrained(NumpyRuntime):
    """The reference in float64 with declared constraints."""

    def __init__(self, constraints: StepConstraints = NO_CONSTRAINTS) -> None:
        super().__init__("float64")
        self._constraints = constraints

    def constraints(self) -> StepConstraints:
        return self._constraints


@dataclass(frozen=True)
class Setup:
    """What fixes an engine beside the model."""

    windows: tuple[int | None, ...] = FULL
    block_tokens: int = 4
    num_blocks: int = 200
    num_rows: int = 8
    token_budget: int = 64
    enable_prefix_caching: bool = True
    is_async: bool = False
    policy: str = "fcfs"
    max_draws: int | None = None
    num_slots: int | None = None
    """History and bias slots each; None: one per row."""
    constraints: StepConstraints = NO_CONSTRAINTS
    sharpness: float = 1.0


_WEIGHTS: dict[tuple[int, float], dict[str, Any]] = {}


def weights_of(setup: Setup) -> dict[str, Any]:
    key = (len(setup.windows), setup.sharpness)
    if key not in _WEIGHTS:
        _WEIGHTS[key] = make_weights(*key)
    return _WEIGHTS[key]


def make_core(
    setup: Setup, runtime: Runtime | None = None, weights: dict[str, Any] | None = None
) -> EngineCore:
    """An engine over the tiny model; by default on the float64 reference."""
    runtime = runtime or Constrained(setup.constraints)
    spec = make_spec(runtime.dtype, setup.windows)
    groups = kv_groups(spec, setup.block_tokens)
    num_slots = setup.num_rows if setup.num_slots is None else setup.num_slots
    sizes = Sizes(
        num_rows=setup.num_rows,
        max_tokens=MAX_LEN + AHEAD,
        token_budget=max(setup.token_budget, setup.num_rows),
        num_history_slots=num_slots,
        num_bias_slots=num_slots,
        num_blocks=dict.fromkeys(sorted({g.pool for g in groups}), setup.num_blocks),
    )
    params = load(runtime, spec, weights_of(setup) if weights is None else weights)
    limits = Limits(
        num_rows=setup.num_rows,
        token_budget=setup.token_budget,
        max_model_len=MAX_LEN,
        num_history_slots=num_slots,
        num_bias_slots=num_slots,
        max_draws=setup.max_draws or setup.num_rows,
        constraints=runtime.constraints(),
        enable_prefix_caching=setup.enable_prefix_caching,
        policy=setup.policy,
    )
    runner = ModelRunner(runtime, spec, params, groups, sizes)
    return EngineCore(runner, limits, is_async=setup.is_async)


def make_request(
    prompt: Iterable[int], request_id: str = "r", priority: int = 0, **params: Any
) -> Request:
    params.setdefault("max_tokens", 6)
    return Request(
        request_id=request_id,
        prompt=list(prompt),
        params=SamplingParams(**params),
        eos_token_ids=EOS,
        max_model_len=MAX_LEN,
        vocab_size=VOCAB,
        priority=priority,
    )


def alone(request: Request, index: int = 0) -> Request:
    """The same request with nothing but its sequence `index`."""
    params = request.params.replace(n=1, seed=request.seed)
    twin = replace_request(request, params)
    twin.sequences = [Sequence(twin, index)]
    return twin


def replace_request(request: Request, params: SamplingParams) -> Request:
    return Request(
        request_id=request.request_id,
        prompt=list(request.prompt),
        params=params,
        eos_token_ids=request.eos_token_ids,
        max_model_len=request.max_model_len,
        vocab_size=request.vocab_size,
        priority=request.priority,
    )


@dataclass
class Stream:
    """What the events of one sequence add up to."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_scores: list[tuple[HostArray, HostArray, int]] = field(default_factory=list)
    """(ids, values, rank) of each prompt token but the first."""

    def same_tokens(self, other: Stream) -> bool:
        return self.tokens == other.tokens


Streams = dict[tuple[str, int], Stream]


def take(streams: Streams, events: Iterable[Any]) -> None:
    for event in events:
        key = (event.sequence.request.request_id, event.sequence.index)
        stream = streams.setdefault(key, Stream())
        if event.prompt_scores is not None:
            first, scores = event.prompt_scores
            assert first == 1 + len(stream.prompt_scores), "prompt scores come in order"
            for ids, values, rank in zip(scores.ids, scores.values, scores.rank, strict=True):
                stream.prompt_scores.append((ids, values, int(rank)))
        if event.token is not None:
            stream.tokens.append(event.token)
            if event.logprobs is not None:
                stream.logprobs.append(event.logprobs)


def run(
    core: EngineCore,
    requests: Iterable[Request],
    *,
    late: dict[int, list[Request]] | None = None,
    each_step: Callable[[int], None] = lambda step: None,
) -> Streams:
    """Runs requests to their end; `late` are added before the step of that number."""
    streams: Streams = {}
    waiting = dict(late or {})
    for request in requests:
        core.add(request)
    step = 0
    while core.has_work or waiting:
        for request in waiting.pop(step, ()):
            core.add(request)
        each_step(step)
        if core.has_work:
            take(streams, core.step())
        step += 1
        assert step < 3000, "the engine makes no progress"
    return streams


def run_alone(
    setup: Setup, request: Request, index: int = 0, runtime: Runtime | None = None
) -> Stream:
    """The sequence on an engine of its own: a large cache, one chunk, no sharing, not ahead."""
    roomy = replace(
        setup,
        block_tokens=16,
        num_blocks=20,
        num_rows=1,
        token_budget=MAX_LEN,
        enable_prefix_caching=False,
        is_async=False,
        max_draws=None,
        num_slots=None,
        constraints=StepConstraints(),
    )
    twin = alone(request, index)
    streams = run(make_core(roomy, runtime), [twin])
    return streams.get((twin.request_id, index), Stream())
