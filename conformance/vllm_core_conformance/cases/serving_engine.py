"""The core's real engine over a tiny model on the backend under test.

One runner per model and target: a static-shape backend compiles its programs once, and weights of
another seed are arguments.

Knows: the engine's public parts. Does not know: what is right (judge), what is asked (cases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.engine.core import EngineCore
from vllm_core.engine.limits import Limits
from vllm_core.engine.request import Event, Request
from vllm_core.models import ModelSpec, kv_groups
from vllm_core.ops import Logprobs
from vllm_core.params import SamplingParams
from vllm_core.plan import Plan
from vllm_core.runner.memory import AHEAD
from vllm_core.runner.runner import ModelRunner, Sizes, StepHandle
from vllm_core.runner.worker import check_supported
from vllm_core_conformance.case import Failed
from vllm_core_conformance.oracle.model import Blueprint
from vllm_core_conformance.target import Raised, Target, calling, numpy_dtype
from vllm_core_conformance.tiny import EOS, load, make_weights, spec_of

Numbers = NDArray[Any]


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
