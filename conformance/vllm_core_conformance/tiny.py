"""Tiny seeded decoders, and the core's real engine over them on the backend under test.

One runner per model and target: a static-shape backend compiles its programs once, and weights of
another seed are arguments.

Knows: specs, weights, the engine's public parts. Does not know: what is right (oracle), what is
asked (cases).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.engine.core import EngineCore
from vllm_core.engine.limits import Limits
from vllm_core.engine.request import Event, Request
from vllm_core.models import ModelSpec, kv_groups
from vllm_core.models.recipe import attention, number_layers
from vllm_core.models.spec import FFNSpec, LayerSpec, MoESpec, RopeSpec
from vllm_core.ops import Logprobs, Param, ParamSpec, Part
from vllm_core.params import SamplingParams
from vllm_core.plan import Plan
from vllm_core.runner.memory import AHEAD
from vllm_core.runner.runner import ModelRunner, Sizes, StepHandle
from vllm_core.runner.worker import check_supported
from vllm_core_conformance.case import Failed
from vllm_core_conformance.oracle.model import Blueprint, Layer
from vllm_core_conformance.target import Raised, Target, calling, numpy_dtype

Numbers = NDArray[Any]

EOS = (3,)
VOCAB = 71
"""More than one segment of 64, and no multiple of anything."""

PLAIN = Blueprint("plain", VOCAB, 32, (Layer(4, 2, 8, 48),) * 3)
WINDOWS = Blueprint(
    "windows",
    VOCAB,
    32,
    tuple(
        Layer(
            6,
            2,
            16,
            40,
            window=window,
            softcap=7.5,
            activation="gelu_tanh",
            sandwich=True,
            qk_norm=True,
        )
        for window in (None, 6)
    ),
    tied=True,
    embedding_scale=1.5,
    logit_softcap=30.0,
)
"""A full and a window group in one pool; G = 3."""
POOLS = Blueprint(
    "pools", VOCAB, 40, tuple(Layer(5, 1, 8, 24, window=w, biases=True) for w in (None, 5, 5))
)
"""Groups of unequal size, so that each has a pool; G = 5."""
EXPERTS = Blueprint("experts", VOCAB, 32, (Layer(4, 4, 8, 24, experts=5, top_k=2),) * 2)
"""A mixture of experts; G = 1."""
LEARNED = Blueprint(
    "learned",
    VOCAB,
    32,
    tuple(
        Layer(2, 2, 16, 40, activation=kind, gated=False, norm="layer", rotates=False, biases=True)
        for kind in ("relu", "gelu")
    ),
    tied=True,
    position_offset=2,
    logit_scale=0.5,
)
"""Learned positions, layer norms, biases everywhere."""


# ---------------------------------------------------------------- a blueprint in the core's words
def spec_of(blueprint: Blueprint, dtype: str) -> ModelSpec:
    layers = [_layer_spec(blueprint, layer, dtype) for layer in blueprint.layers]
    numbered, specs = number_layers(layers)
    rotates = any(layer.rotates for layer in blueprint.layers)
    rope = RopeSpec(blueprint.layers[0].dim, blueprint.inverse_frequency, 1.0)
    return ModelSpec(
        architecture=f"conformance model {blueprint.name!r}",
        vocab_size=blueprint.vocab,
        hidden_size=blueprint.hidden,
        layers=numbered,
        attention_specs=specs,
        ropes=(rope,) if rotates else (),
        norm=blueprint.layers[0].norm,
        eps=blueprint.eps,
        max_model_len=blueprint.max_len,
        tied_embeddings=blueprint.tied,
        embedding_scale=blueprint.embedding_scale,
        position_offset=blueprint.position_offset,
        logit_softcap=blueprint.logit_softcap,
        logit_scale=blueprint.logit_scale,
    )


def _layer_spec(blueprint: Blueprint, layer: Layer, dtype: str) -> LayerSpec:
    ffn: FFNSpec | MoESpec = FFNSpec(layer.ffn, layer.activation, layer.gated, layer.biases)
    if layer.experts:
        ffn = MoESpec(layer.experts, layer.top_k, layer.ffn, layer.renormalize)
    heads = (layer.q_heads, layer.kv_heads, layer.dim)
    return LayerSpec(
        attention=attention(
            heads, dtype, scale=layer.scale, window=layer.window, softcap=layer.softcap
        ),
        attention_index=0,
        kv_layer=0,
        rope=0 if layer.rotates else None,
        ffn=ffn,
        norm=layer.norm,
        eps=blueprint.eps,
        is_sandwich=layer.sandwich,
        qk_norm=layer.qk_norm,
        qkv_bias=layer.biases,
        output_bias=layer.biases,
    )


# ---------------------------------------------------------------- weights
def make_weights(blueprint: Blueprint, seed: int, round_to: Callable[[Numbers], Numbers]) -> Any:
    """float64 arrays that the dtype holds exactly, in the form of oracle.model.Weights."""
    rng = np.random.default_rng([seed, zlib.crc32(blueprint.name.encode())])
    size = blueprint.hidden
    own_experts = max(layer.experts for layer in blueprint.layers)

    def matrix(*shape: int, scale: float) -> Numbers:
        return round_to(rng.standard_normal(shape) * scale * shape[-1] ** -0.5)

    def norm(length: int, kind: str) -> dict[str, Numbers]:
        found = {"weight": round_to(1 + 0.1 * rng.standard_normal(length))}
        if kind == "layer":
            found["bias"] = round_to(0.1 * rng.standard_normal(length))
        return found

    def linear(rows: int, length: int, scale: float, bias: bool) -> dict[str, Numbers]:
        found = {"weight": matrix(rows, length, scale=scale)}
        if bias:
            found["bias"] = round_to(0.2 * rng.standard_normal(rows))
        return found

    def layer(facts: Layer) -> dict[str, Any]:
        heads = facts.q_heads + 2 * facts.kv_heads
        own: dict[str, Any] = {
            "input_norm": norm(size, facts.norm),
            "qkv": linear(heads * facts.dim, size, 1.3, facts.biases),
            "output": linear(size, facts.q_heads * facts.dim, 2.0, facts.biases),
            "ffn_norm": norm(size, facts.norm),
        }
        if facts.qk_norm:
            own |= {"q_norm": norm(facts.dim, facts.norm), "k_norm": norm(facts.dim, facts.norm)}
        if facts.sandwich:
            own |= {name: norm(size, facts.norm) for name in SANDWICH}
        if facts.experts:
            return own | _expert_weights(facts, size, own, matrix)
        if facts.gated:
            own["gate_up"] = linear(2 * facts.ffn, size, 1.5, facts.biases)
        else:
            own["up"] = linear(facts.ffn, size, 1.5, facts.biases)
        own["down"] = linear(size, facts.ffn, 2.0, facts.biases)
        return own

    embed = rng.standard_normal((blueprint.vocab, size))
    if own_experts:
        embed = _tagged(embed, own_experts, rng)
    if blueprint.tied:
        embed *= np.exp(0.5 * rng.standard_normal((blueprint.vocab, 1)))
    weights: dict[str, Any] = {
        "embed": {"weight": round_to(embed)},
        "layers": [layer(facts) for facts in blueprint.layers],
        "norm": norm(size, blueprint.layers[0].norm),
    }
    if blueprint.position_offset is not None:
        rows = blueprint.max_len + AHEAD + blueprint.position_offset
        weights["positions"] = {"weight": round_to(0.5 * rng.standard_normal((rows, size)))}
    if not blueprint.tied:
        # rows of very different length: the best token stands out from the noise of the others
        length = np.exp(1.0 * rng.standard_normal((blueprint.vocab, 1)))
        head = rng.standard_normal((blueprint.vocab, size)) * length * size**-0.5 * 3.0
        weights["head"] = {"weight": round_to(head)}
    return weights


SANDWICH = ("post_attention_norm", "post_ffn_norm")


def _tagged(embed: Numbers, experts: int, rng: np.random.Generator) -> Numbers:
    """The first dims of an embedding name the token's experts: routing then has wide margins, which
    no honest rounding crosses."""
    embed = embed.copy()
    embed[:, :experts] = 0.0
    for row in embed:
        first, second = rng.permutation(experts)[:2]
        row[first], row[second] = 3.0, 2.0
    return embed


def _expert_weights(
    facts: Layer, size: int, own: dict[str, Any], matrix: Callable[..., Numbers]
) -> dict[str, Any]:
    """Experts; nothing but the embedding writes into the dims that the router reads."""
    own["output"]["weight"][: facts.experts] = 0.0
    router = np.zeros((facts.experts, size))
    router[np.arange(facts.experts), np.arange(facts.experts)] = 2.0
    down = matrix(facts.experts, size, facts.ffn, scale=2.0)
    down[:, : facts.experts] = 0.0
    return {
        "router": {"weight": router},
        "gate_up": {"weight": matrix(facts.experts, 2 * facts.ffn, size, scale=1.5)},
        "down": {"weight": down},
    }


def load(target: Target, spec: ModelSpec, weights: Any) -> dict[str, Any]:
    """On the device, fused weights in parts as a loader brings them."""
    wide = np.dtype(np.float64) if target.dtype == "float64" else np.dtype(np.float32)
    stored = numpy_dtype(target.dtype)

    def one(name: str, tensors: Mapping[str, Numbers], cuts: Sequence[int] = ()) -> Param:
        weight = tensors["weight"]
        is_norm = weight.ndim == 1
        role = "norm" if is_norm else "experts" if weight.ndim == 3 else "linear"
        if name in ("embed", "positions"):
            role = "embedding"
        kind = wide if is_norm else stored
        pieces = {key: np.split(x.astype(kind), cuts) for key, x in tensors.items()}
        parts = [
            Part("dense", {key: piece[i] for key, piece in pieces.items()}, len(rows))
            for i, rows in enumerate(pieces["weight"])
        ]
        return target.load(ParamSpec(name, weight.shape, role), parts)

    def layer(number: int, own: Mapping[str, Any]) -> dict[str, Param]:
        a = spec.layers[number].attention
        q, kv = a.num_q_heads * a.dim_qk, a.num_kv_heads * a.dim_qk
        found = {}
        for name, tensors in own.items():
            cuts: tuple[int, ...] = ()
            if name == "qkv":
                cuts = (q, q + kv)
            elif name == "gate_up" and tensors["weight"].ndim == 2:
                cuts = (len(tensors["weight"]) // 2,)
            found[name] = one(f"layers.{number}.{name}", tensors, cuts)
        return found

    params: dict[str, Any] = {
        name: one(name, tensors) for name, tensors in weights.items() if name != "layers"
    }
    if spec.tied_embeddings:
        params["head"] = params["embed"]
    layers = [layer(number, own) for number, own in enumerate(weights["layers"])]
    with calling("stack_layers"):
        params["layers"] = target.ops.stack_layers(layers, spec.layers)
    return params


# ---------------------------------------------------------------- the engine
@dataclass(frozen=True)
class Setup:
    """One engine over a served model; what is None follows from the model."""

    token_budget: int | None = None
    num_rows: int | None = None
    num_blocks: int | None = None
    """Per pool, the null block included; at most what the runner holds."""
    is_async: bool = True
    prefix_caching: bool = True
    policy: str = "fcfs"


class Runner(ModelRunner):
    """The core's runner; it remembers what the backend raised, which the engine would survive."""

    error: BaseException | None = None

    def execute(self, plan: Plan) -> StepHandle:
        try:
            return _Handle(super().execute(plan), self)
        except Exception as error:
            self.error = error
            raise


class _Handle(StepHandle):
    def __init__(self, handle: StepHandle, runner: Runner) -> None:
        self._handle, self._runner = handle, runner

    def wait(self) -> Any:
        try:
            return self._handle.wait()
        except Exception as error:
            self._runner.error = error
            raise


@dataclass
class Stream:
    """What the events of one sequence add up to."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_scores: list[tuple[Numbers, Numbers, int]] = field(default_factory=list)
    """(ids, values, rank) of each prompt token but the first."""


Streams = dict[tuple[str, int], Stream]


@dataclass
class Served:
    """A model on the target."""

    target: Target
    blueprint: Blueprint
    runner: Runner
    sizes: Sizes
    block_tokens: int
    weights: Any = None
    seed: int | None = None

    @property
    def max_len(self) -> int:
        return self.blueprint.max_len

    def least_blocks(self, num_tokens: int) -> int:
        """Blocks per pool, the null block included, that one sequence of this length needs."""
        held = [
            sum(
                group.blocks_held(num_tokens, self.sizes.token_budget)
                for group in self.runner.groups
                if group.pool == pool
            )
            for pool in self.sizes.num_blocks
        ]
        return 1 + max(held)

    def use(self, seed: int, weights: Any = None) -> None:
        """The weights of a seed, or these, as the arguments of the same programs."""
        if weights is None and seed == self.seed:
            return
        self.seed = seed if weights is None else None
        self.weights = weights or make_weights(self.blueprint, seed, self.target.round)
        self.runner.params = load(self.target, self.runner.spec, self.weights)

    def engine(self, setup: Setup) -> EngineCore:
        """A new engine on a cache that holds NaN wherever nobody wrote."""
        runner, sizes = self.runner, self.sizes
        runner.sizes, runner.error = sizes, None
        with calling("alloc of a new cache and state"):
            runner.reset()
        self._poison()
        blocks = setup.num_blocks
        if blocks is not None:
            fewer = {pool: min(blocks, own) for pool, own in sizes.num_blocks.items()}
            runner.sizes = replace(sizes, num_blocks=fewer)
        runtime = self.target.runtime
        with calling("constraints"):
            constraints = runtime.constraints()
        rows = setup.num_rows or sizes.num_rows
        budget = setup.token_budget or sizes.token_budget
        draws = rows
        if self.target.caps.max_logit_rows is not None:
            draws = min(draws, self.target.caps.max_logit_rows)
        limits = Limits(
            num_rows=sizes.num_rows if setup.num_rows is None else rows,
            token_budget=max(budget, constraints.chunk_multiple),
            max_model_len=self.max_len,
            num_history_slots=sizes.num_history_slots,
            num_bias_slots=sizes.num_bias_slots,
            max_draws=draws,
            constraints=constraints,
            enable_prefix_caching=setup.prefix_caching,
            policy=setup.policy,
        )
        return EngineCore(runner, limits, is_async=setup.is_async)

    def _poison(self) -> None:
        """NaN in every block but the null block: nobody may see what nobody wrote."""
        runner, attention = self.runner, self.target.runtime.attention
        kind = numpy_dtype(self.target.dtype)
        for group in runner.groups:
            spec, ids = group.spec, list(range(1, self.sizes.num_blocks[group.pool]))
            shape = (group.layers, len(ids), group.block_tokens, spec.num_kv_heads)
            arrays = {
                "k": np.full((*shape, spec.dim_qk), np.nan, kind),
                "v": np.full((*shape, spec.dim_v), np.nan, kind),
            }
            with calling("import_blocks"):
                runner.kv = attention.import_blocks(runner.kv, group, ids, arrays)

    def request(self, prompt: Iterable[int], name: str, **params: Any) -> Request:
        params.setdefault("max_tokens", 6)
        return Request(
            request_id=name,
            prompt=[int(token) for token in prompt],
            params=SamplingParams(**params),
            eos_token_ids=EOS,
            max_model_len=self.max_len,
            vocab_size=self.blueprint.vocab,
            priority=0,
        )


def serve(
    target: Target,
    blueprint: Blueprint,
    seed: int,
    *,
    block: int = 4,
    rows: int = 5,
    budget: int = 16,
    sequences: int = 8,
) -> Served:
    """The model with weights of the seed; its runner is shared by all cases with these sizes.

    block: the wished block size; the nearest that the backend offers is taken, and contexts grow
    with it. sequences: how many longest ones the cache holds.
    """
    spec = spec_of(blueprint, target.dtype)
    with calling("checking the model against the capabilities"):
        check_supported(spec, target.runtime)
    block = _nearest(target, spec, block)
    blueprint = replace(blueprint, max_len=max(blueprint.max_len, 4 * block))
    tag = ("served", blueprint, block, rows, budget, sequences)
    if tag not in target.memo:
        spec = spec_of(blueprint, target.dtype)
        groups = kv_groups(spec, block)
        columns = -(-(blueprint.max_len + AHEAD) // block)
        sizes = Sizes(
            num_rows=rows,
            max_tokens=blueprint.max_len + AHEAD,
            token_budget=budget,
            num_history_slots=2,  # few, so that all are taken at times
            num_bias_slots=2,
            num_blocks={
                pool: 1 + sequences * columns * sum(g.pool == pool for g in groups)
                for pool in sorted({g.pool for g in groups})
            },
        )
        with calling("making a model runner"):
            runner = Runner(target.runtime, spec, {}, groups, sizes)
        target.memo[tag] = Served(target, blueprint, runner, sizes, block)
    served: Served = target.memo[tag]
    served.use(seed)
    return served


def _nearest(target: Target, spec: ModelSpec, wanted: int) -> int:
    with calling("block_tokens"):
        offers = [target.runtime.attention.block_tokens(a) for a in spec.attention_specs]
    common = set(offers[0]).intersection(*offers[1:])
    if not common:
        raise Failed("block_tokens offers no size that every attention layer of a model can have")
    return min(common, key=lambda size: (abs(np.log2(size / wanted)), size))


def run(
    core: EngineCore,
    requests: Iterable[Request],
    *,
    late: Mapping[int, Sequence[Request]] | None = None,
    each_step: Callable[[int, Streams], None] = lambda step, streams: None,
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
        each_step(step, streams)
        if core.has_work:
            take(streams, one_step(core))
        step += 1
        if step > 3000:
            raise Failed("the engine makes no progress: 3000 steps, and requests still run")
    return streams


def one_step(core: EngineCore) -> list[Event]:
    """A step in which the backend must not raise, although an engine would survive it."""
    runner: Any = core.runner
    with calling("a step of the engine"):
        events = core.step()
        if runner.error is not None:
            error: BaseException = runner.error
            raise Raised("a step of the engine", error)
    return events


def take(streams: Streams, events: Iterable[Event]) -> None:
    for event in events:
        key = (event.sequence.request.request_id, event.sequence.index)
        stream = streams.setdefault(key, Stream())
        if event.prompt_scores is not None:
            _, scores = event.prompt_scores
            for ids, values, rank in zip(scores.ids, scores.values, scores.rank, strict=True):
                stream.prompt_scores.append((ids, values, int(rank)))
        if event.token is not None:
            stream.tokens.append(event.token)
            if event.logprobs is not None:
                stream.logprobs.append(event.logprobs)
