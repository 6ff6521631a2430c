"""Compiles attention for one target, in a process of its own; prints a line of JSON for each.

`python -m vllm_core_tpu.compile.kernels TARGET DUMPS KIND:STEP ...`, started by `measure`, which
sets the environment that libtpu reads once.

Knows: how the seam's plan and attention are traced, the compiler. Does not know: budgets.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
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
        num_tokens=_array(rows),
        last_token=_array(rows),
        params=_array(rows, NUM_COLUMNS),
        history=_array(1, CONTEXT),
        bias=_array(1, VOCAB, dtype="float32"),
    )
    plan = jax.eval_shape(plan_of, state, _array(*layout.template().shape))
    cache = (BLOCKS, *attention.block_shape(group))
    new = _array(key.tokens, kind.kv_heads, kind.dim, dtype=kind.dtype)
    q = _array(key.tokens, spec.num_q_heads, kind.dim, dtype=kind.dtype)
    sinks = _array(spec.num_q_heads, dtype="float32") if kind.sinks else None
    kv = (jax.ShapeDtypeStruct(cache, attention.storage(group)),)  # type: ignore[no-untyped-call]
    return attend, (kv, _array(), q, new, new, plan, sinks), plan.static


def _array(*shape: int, dtype: str = "int32") -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))  # type: ignore[no-untyped-call]


def compiled(function: Any, arguments: tuple[Any, ...], donated: Any, sharding: Any) -> Any:
    """The program for the device of `sharding`. OutOfMemory or BackendError if it cannot be."""

    def place(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # type: ignore[no-untyped-call]

    placed = jax.tree_util.tree_map(place, arguments)
    traced = jax.jit(function, donate_argnums=donated).trace(*placed)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def pallas_kernels(program: Any) -> list[str]:
    """Their names in the program."""
    pattern = r'%(\S+) = .*custom_call_target="tpu_custom_call"'
    return re.findall(pattern, program.as_text())


def facts(kind: Kind, step: str, target: str, dump: Path) -> dict[str, Any]:
    """What the compiler says of one configuration: bytes, bundles."""
    name = f"{kind.name} {step} on {target}"
    start = time.perf_counter()
    with compiling(name):
        attend, arguments, static = attention_of(kind, step)
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
    (kernel,) = pallas_kernels(program)
    schedule = dumps.read(dump, kernel)
    if schedule is None:
        found["error"] = "the compiler left no schedule; its flags may have changed"
    else:
        found |= asdict(schedule)
    return found


def main(target: str, dump: Path, work: list[str]) -> None:
    for item in work:
        kind, step = item.split(":")
        try:
            found = facts(configurations.find(kind), step, target, dump)
        except VllmCoreError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"kind": kind, "step": step, "target": target} | found), flush=True)
        for path in dump.iterdir():  # tens of MB each
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
