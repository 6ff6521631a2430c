"""Compiles whole steps of models for one target, in a process of its own; a line of JSON for each.

The programs are the core's own, traced with shapes in place of weights, state and cache.

Knows: how the core builds a step, the compiler. Does not know: budgets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from vllm_core.backend import StepLayout
from vllm_core.models import ModelSpec, find_recipe, kv_groups
from vllm_core.ops import NUM_COLUMNS, BucketKey, DeviceState, Param, ParamSpec, Part
from vllm_core.runner.programs import step_program
from vllm_core.weights.loader import dummy_params
from vllm_core_tpu.attention import TpuAttention
from vllm_core_tpu.compile import dumps, targets
from vllm_core_tpu.compile.configurations import BLOCKS, CONTEXT, MODELS, STEPS
from vllm_core_tpu.compile.kernels import array, compiled, serve
from vllm_core_tpu.compiler_errors import compiling
from vllm_core_tpu.runtime import TpuRuntime

BLOCK_TOKENS = 32


class Unloaded(TpuRuntime):
    """Weights are shapes, kernels are not interpreted."""

    attention: TpuAttention

    def __init__(self) -> None:
        device = jax.local_devices(backend="cpu")[0]
        super().__init__(device, "bfloat16")
        self.attention = TpuAttention(device, interpret=False)

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        dtype = jnp.dtype("float32" if spec.role == "norm" else self.dtype)
        shapes = {"weight": spec.shape, "bias": spec.shape[:-1]}
        return Param({name: jnp.zeros(shapes[name], dtype) for name in parts[0].tensors})


def program_of(model: str, step: str) -> tuple[Any, tuple[Any, ...]]:
    """(step program, its arguments as shapes)."""
    runtime = Unloaded()
    name, fields = MODELS[model]
    config = getattr(transformers, name)(**fields)
    recipe = find_recipe(config)
    spec: ModelSpec = recipe.spec(config, runtime.dtype)
    rules = recipe.weights(spec, config)
    params = jax.eval_shape(lambda: dummy_params(rules, runtime, spec.layers))
    groups = kv_groups(spec, BLOCK_TOKENS)
    tokens, rows = STEPS[step]
    features = runtime.buckets(tokens, rows, 1).features
    widths = (CONTEXT // BLOCK_TOKENS,) * len(groups)
    # a step that decodes draws greedily, one with prompts does all that can be asked for
    key = BucketKey(tokens, rows, widths, features[0 if step == "decode" else -1])
    layout = StepLayout(key, rows, rows, 1, (BLOCK_TOKENS,) * len(groups))
    state = DeviceState(
        tables=jax.eval_shape(lambda: runtime.block_tables.alloc(rows, widths)),
        num_tokens=array(rows + 1),
        last_token=array(rows + 1),
        params=array(rows + 1, NUM_COLUMNS),
        history=array(rows + 1, CONTEXT),
        bias=array(2, spec.vocab_size, dtype="float32"),
    )
    blocks = {group.pool: BLOCKS for group in groups}
    kv = jax.eval_shape(lambda: _cache(runtime, groups, blocks))
    program = step_program(runtime.device, spec, groups, layout, 0)
    buffer = array(*layout.template().shape)

    def run(params: Any, state: Any, kv: Any, buffer: Any) -> Any:
        return program.fn(params, state, kv, _Step(buffer))

    return run, (params, state, kv, buffer)


class _Step:
    """A DeviceStep without a part of the host."""

    host_part = None

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer


def _cache(runtime: Unloaded, groups: Any, blocks: dict[int, int]) -> Any:
    shapes = {
        group.pool: (blocks[group.pool], *runtime.attention.block_shape(group)) for group in groups
    }
    kinds = {group.pool: runtime.attention.storage(group) for group in groups}
    return tuple(jnp.zeros(shapes[pool], kinds[pool]) for pool in sorted(shapes))


def facts(model: str, step: str, target: str, dump: Path) -> dict[str, Any]:
    """What the compiler says of one step: bytes, bundles of all that it runs."""
    start = time.perf_counter()
    with compiling(f"a {step} step of {model} on {target}"):
        run, arguments = program_of(model, step)
        program = compiled(run, arguments, (1, 2), targets.sharding(target))
    memory = program.memory_analysis()
    found: dict[str, Any] = {
        "code": memory.generated_code_size_in_bytes,
        "hbm_temp": memory.temp_size_in_bytes,
        "hbm_arguments": memory.argument_size_in_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }
    schedule = dumps.read_program(dump)
    if schedule is None:
        return found | {"error": dumps.NOTHING}
    return found | asdict(schedule)


if __name__ == "__main__":
    serve(facts, sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
