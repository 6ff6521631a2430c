"""Compiles attention for one target, in a process of its own; prints a line of JSON for each.

`python -m vllm_core_tpu.compile.kernels TARGET DUMPS KIND:STEP ...`, started by `measure`, which
sets the environment that libtpu reads once.

Knows: how the seam's plan and attention are traced, the compiler. Does not know: budgets.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vllm_core.backend import RectangleTables, StepLayout
from vllm_core.bindings.jax.ops import JaxOps
from vllm_core.errors import VllmCoreError
from vllm_core.ops import NUM_COLUMNS, DeviceState
from vllm_core_tpu.attention import TpuAttention
from vllm_core_tpu.compile import configurations, dumps, targets
from vllm_core_tpu.compile.configurations import BLOCKS, CONTEXT, Kind
from vllm_core_tpu.compiler_errors import compiling

VOCAB = 1024
"""Of no matter to attention."""


def attention_of(kind: Kind, step: str) -> tuple[Any, tuple[Any, ...], Any]:
    """(attend(kv, layer, q, k, v, plan, sinks), its arguments as shapes, plan.static)."""
    device = jax.local_devices(backend="cpu")[0]
    ops, attention = JaxOps(device), TpuAttention(device, interpret=False)
    tables = RectangleTables(ops)
    key, spec, group = kind.key(step), kind.spec, kind.group
    layout = StepLayout(key, key.rows, 0, 0, (kind.block_tokens,))

    def plan_of(state: DeviceState, buffer: Any) -> Any:
        unpacked = layout.unpack(buffer)
        view, state = ops.expand(tables, state, unpacked, layout.block_tokens, VOCAB)
        return attention.plan(state, view, unpacked, key, None, (spec,), (group,))[0]

    def attend(kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, sinks: Any) -> Any:
        return attention.attend(kv, layer, q, k, v, plan, sinks=sinks, return_lse=kind.lse)

    rows = key.rows + 1
    state = DeviceState(
        tables=jax.eval_shape(lambda: tables.alloc(key.rows, key.widths)),
        num_tokens=array(rows),
        last_token=array(rows),
        params=array(rows, NUM_COLUMNS),
        history=array(1, CONTEXT),
        bias=array(1, VOCAB, dtype="float32"),
    )
    plan = jax.eval_shape(plan_of, state, array(*layout.template().shape))
    cache = (BLOCKS, *attention.block_shape(group))
    new = array(key.tokens, kind.kv_heads, kind.dim, dtype=kind.dtype)
    q = array(key.tokens, spec.num_q_heads, kind.dim, dtype=kind.dtype)
    sinks = array(spec.num_q_heads, dtype="float32") if kind.sinks else None
    kv = (jax.ShapeDtypeStruct(cache, attention.storage(group)),)  # type: ignore[no-untyped-call]
    return attend, (kv, array(), q, new, new, plan, sinks), plan.static


def array(*shape: int, dtype: str = "int32") -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))  # type: ignore[no-untyped-call]


def compiled(function: Any, arguments: tuple[Any, ...], donated: Any, sharding: Any) -> Any:
    """The program for the device of `sharding`. OutOfMemory or BackendError if it cannot be."""

    def place(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # type: ignore[no-untyped-call]

    placed = jax.tree_util.tree_map(place, arguments)
    traced = jax.jit(function, donate_argnums=donated).trace(*placed)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def facts(kind: str, step: str, target: str, dump: Path) -> dict[str, Any]:
    """What the compiler says of one configuration: bytes, bundles."""
    start = time.perf_counter()
    with compiling(f"{kind} {step} on {target}"):
        attend, arguments, static = attention_of(configurations.find(kind), step)
        program = compiled(attend, arguments, 0, targets.sharding(target))
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    found: dict[str, Any] = {
        "code": memory.generated_code_size_in_bytes,
        "hbm_temp": memory.temp_size_in_bytes,
        "columns": static.shape.columns,
        "queries": static.shape.queries,
        "seconds": round(seconds, 1),
    }
    names = dumps.kernels(dump)
    schedule = dumps.read(dump, names[0]) if len(names) == 1 else None
    if schedule is None:
        return found | {"error": dumps.NOTHING}
    return found | asdict(schedule)


def serve(
    facts_of: Callable[..., dict[str, Any]], target: str, dump: Path, work: list[str]
) -> None:
    """Prints facts_of(kind, step, target, dump) for each "kind:step" as a line of JSON."""
    for item in work:
        kind, step = item.split(":")
        try:
            found = facts_of(kind, step, target, dump)
        except VllmCoreError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        except Exception as error:  # the others are compiled all the same
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(json.dumps({"kind": kind, "step": step, "target": target} | found), flush=True)
        for path in dump.iterdir():  # megabytes, and names that come again
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    serve(facts, sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
