"""Backends that are right in a single step and wrong in a running engine.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_core.backend import HostStep, Program, Runtime
from vllm_core.ops import BucketKey
from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import (
    Method,
    Numbers,
    Open,
    ops,
    planted,
    replaced,
)
from vllm_core_conformance.zoo.faults.planted import runtime as runtime_with


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False, *profiles: str) -> Fault:
    return Fault(name, "serving", says, open_wrong, worst, profiles=profiles or ("core", "serving"))


# ---------------------------------------------------------------- rows and their owners
def _columns_of_first_owner(*columns: Column) -> Open:
    """A row that was reset once keeps these parameters for good."""

    def plant(runtime: Runtime) -> None:
        kept: dict[int, Numbers] = {}
        places = [2 + int(column) for column in columns]

        def wrong(base: Method, tables: Any, state: Any, step: Any, *rest: Any) -> Any:
            resets = np.array(step.resets)
            for reset in resets[resets[:, 0] < len(state.num_tokens) - 1]:
                reset[places] = kept.setdefault(int(reset[0]), reset[places].copy())
            for i, row in enumerate(resets[:, 0]):
                if int(row) in kept:
                    resets[i, places] = kept[int(row)]
            return base(tables, state, step._replace(resets=resets), *rest)

        replaced(runtime.ops, expand=wrong)

    return planted(plant)


def _reset_late(runtime: Runtime) -> None:
    """A row's parameters arrive one step late when the row had an owner before."""
    used: set[int] = set()
    waiting: dict[int, Numbers] = {}

    def wrong(base: Method, tables: Any, state: Any, step: Any, *rest: Any) -> Any:
        resets, scrap = np.array(step.resets), len(state.num_tokens) - 1
        params = np.array(state.params)
        for row, values in waiting.items():
            if row < scrap:
                params[row] = values
        waiting.clear()
        for reset in resets:
            row = int(reset[0])
            if row < scrap and row in used:
                waiting[row] = reset[2:].copy()
                reset[2:] = params[row]
            used.add(row)
        state = state._replace(params=params)
        return base(tables, state, step._replace(resets=resets), *rest)

    replaced(runtime.ops, expand=wrong)


def _bias_once(runtime: Runtime) -> None:
    """A bias slot keeps what was uploaded first."""
    filled: set[int] = set()

    def wrong(base: Method, x: Any, index: Any, value: Any) -> Any:
        is_bias = len(index) == 1 and x.ndim == 2 and x.dtype == np.float32 and len(index[0]) == 1
        if is_bias and int(index[0][0]) in filled:
            return x
        if is_bias:
            filled.add(int(index[0][0]))
        return base(x, index, value)

    replaced(runtime.ops, put=wrong)


def _output_forgotten(base: Method, tables: Any, state: Any, step: Any, *rest: Any) -> Any:
    """When a row is taken up again, only its prompt is put back into the history."""
    h = np.array(step.history_changes)
    for reset in step.resets[step.resets[:, 0] < len(state.num_tokens) - 1]:
        slot, length = reset[2 + int(Column.HISTORY_SLOT)], reset[2 + int(Column.PROMPT_LEN)]
        h[(h[:, 0] == slot) & (h[:, 1] >= length), 0] = len(state.history) - 1
    return base(tables, state, step._replace(history_changes=h), *rest)


# ---------------------------------------------------------------- lengths, hits, batches
def _positions(change: Method) -> Open:
    """expand with other positions (and nothing else): change(positions, view, state, step)."""

    def wrong(base: Method, tables: Any, state: Any, step: Any, *rest: Any) -> Any:
        view, state = base(tables, state, step, *rest)
        positions = np.where(view.valid, change(view.positions, view, state, step), 0)
        return view._replace(positions=positions.astype(np.int32)), state

    return ops(expand=wrong)


def _hit_in_blocks(positions: Numbers, view: Any, state: Any, step: Any) -> Numbers:
    """After a prefix hit positions begin at the hit, rounded down to 32 tokens."""
    out = np.array(positions)
    for reset in step.resets:
        if reset[0] < len(state.num_tokens) - 1:
            out[view.row == reset[0]] -= reset[1] % 32
    return out


def _chunk_from_zero(positions: Numbers, view: Any, state: Any, step: Any) -> Numbers:
    """In a step with several rows, a later chunk of a prompt begins at 0."""
    lengths = (step.query_start[1:] - step.query_start[:-1])[view.sequence]
    begin = state.num_tokens[view.row]
    is_mixed = (step.row < len(state.num_tokens) - 1).sum() > 1
    return np.where(is_mixed & (lengths > 1), positions - begin, positions)


def _drift(positions: Numbers, view: Any, state: Any, step: Any) -> Any:
    """Every 50 tokens a position is lost."""
    return positions - positions // 50


def _many_decode(base: Method, state: Any, step: Any, view: Any, tokens: Any) -> Any:
    """With more than eight rows decoding, the ninth takes the token of the first."""
    if step.split[0] > 8:
        tokens = np.array(tokens)
        tokens[8] = tokens[0]
    return base(state, step, view, tokens)


def _mixed_step(base: Method, state: Any, step: Any, view: Any, tokens: Any) -> Any:
    """In a mixed step the last decoding row keeps its old token."""
    if 0 < step.split[0] < step.split[2]:
        tokens = np.array(tokens)
        tokens[step.split[0] - 1] = -1
    return base(state, step, view, tokens)


def _by_batch(base: Method, x: Any, param: Any) -> Any:
    """Logits waver by up to 0.2 with the number of rows."""
    out = base(x, param)
    wave = np.cos(np.arange(out.shape[1]) * len(out))
    return (out + 0.2 * wave).astype(out.dtype)


def _by_row(base: Method, x: Any, param: Any) -> Any:
    """Logits of row i waver by 0.1 with i."""
    out = base(x, param)
    wave = np.cos(np.outer(np.arange(len(out)) + 1, np.arange(out.shape[1])))
    return (out + 0.1 * (wave - np.cos(np.arange(out.shape[1])))).astype(out.dtype)


def _after_steps(count: int) -> Callable[[Runtime], None]:
    """From a number of steps on, the first row's logits are those of the last one."""

    def plant(runtime: Runtime) -> None:
        calls: list[int] = []

        def wrong(base: Method, x: Any, param: Any) -> Any:
            out = base(x, param)
            calls.append(1)
            if len(calls) > count:
                out[0] = out[-1]
            return out

        replaced(runtime.ops, logits=wrong)

    return plant


def _slow_drift(runtime: Runtime) -> None:
    """The residual is scaled by a little more at each position, as a lossy cache would."""

    def wrong(
        base: Method, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any
    ) -> Any:
        slots, _, starts, lengths, _ = plan.arrays
        scale = np.ones(len(slots), q.dtype)
        for row, length in enumerate(lengths):
            begin, end = starts[row], starts[row + 1]
            scale[begin:end] += 2e-3 * (length - (end - begin) + np.arange(end - begin))
        out, lse, kv = base(kv, layer, q, k, v, plan, **more)
        return (out * scale[:, None, None]).astype(out.dtype), lse, kv

    replaced(runtime.attention, attend=wrong)


# ---------------------------------------------------------------- the cache under reuse
def _full_blocks_kept(runtime: Runtime) -> None:
    """A copy of full blocks in the kernel's layout, kept by block id, outlives its owner."""
    kept: dict[Any, Numbers] = {}
    attention: Any = runtime.attention

    def wrong(
        base: Method, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any
    ) -> Any:
        out, lse, kv = base(kv, layer, q, k, v, plan, **more)
        _, tables, _, lengths, _ = plan.arrays
        group, size = plan.group, plan.group.block_tokens
        cache = attention._view(kv, group)
        old = {}
        for row, length in enumerate(lengths):
            for block in tables[row, : length // size]:
                key = (group.id, int(layer), int(block))
                if key in kept:
                    old[int(block)] = cache[block, layer].copy()
                    cache[block, layer] = kept[key]
                else:
                    kept[key] = cache[block, layer].copy()
        if not old:
            return out, lse, kv
        slots = np.where(np.isin(plan.arrays[0] // size, list(old)), 0, plan.arrays[0])
        again = type(plan)((slots, *plan.arrays[1:]), plan.spec, plan.group)
        out, lse, kv = base(kv, layer, q, k, v, again, **more)
        for block, content in old.items():
            cache[block, layer] = content
        return out, lse, kv

    replaced(runtime.attention, attend=wrong)


def _loop_index(
    base: Method, body: Any, x: Any, kv: Any, params: Any, specs: Sequence[Any], shared: Any = ()
) -> Any:
    """Layers address the cache by their place in the model, wrapped into their group."""
    count: dict[int, int] = {}
    for spec in specs:
        count[spec.attention_index] = count.get(spec.attention_index, 0) + 1
    for place, (layer, spec) in enumerate(zip(params, specs, strict=True)):
        x, kv = body(x, kv, layer, spec, place % max(count[spec.attention_index], 1), *shared)
    return x, kv


def _one_layer_of_cache(
    base: Method, body: Any, x: Any, kv: Any, params: Any, specs: Sequence[Any], shared: Any = ()
) -> Any:
    """The last layer shares the cache of the one before."""
    for layer, spec in zip(params, specs, strict=True):
        x, kv = body(x, kv, layer, spec, min(spec.kv_layer, max(len(specs) - 2, 0)), *shared)
    return x, kv


def _first_params(
    base: Method, body: Any, x: Any, kv: Any, params: Any, specs: Sequence[Any], shared: Any = ()
) -> Any:
    """Equal layers are one run, and a run of more than two wraps."""
    for place, spec in enumerate(specs):
        x, kv = body(x, kv, params[place if place < 2 else place - 2], spec, spec.kv_layer, *shared)
    return x, kv


# ---------------------------------------------------------------- programs and buffers
def _by_tokens(runtime: Runtime) -> None:
    """Compiled steps are kept by their number of tokens."""
    kept: dict[Any, Any] = {}

    def wrong(base: Method, program: Program, key: BucketKey | None) -> Any:
        run = base(program, key)
        if program.name != "step" or key is None:
            return run
        return kept.setdefault(key.tokens, run)

    replaced(runtime, compile=wrong)


def _features_forgotten(runtime: Runtime) -> None:
    """Compiled steps are kept by shape; features do not count."""
    kept: dict[Any, Any] = {}

    def wrong(base: Method, program: Program, key: BucketKey | None) -> Any:
        run = base(program, key)
        if program.name != "step" or key is None:
            return run
        return kept.setdefault((key.tokens, key.rows, key.widths), run)

    replaced(runtime, compile=wrong)


def _one_staging_buffer(runtime: Runtime) -> None:
    """Steps of one key are uploaded to one place: a second upload overwrites the first."""
    kept: dict[Any, Any] = {}

    def wrong(base: Method, packed: Numbers, host: HostStep, key: BucketKey) -> Any:
        step = base(packed, host, key)
        place: Any = kept.setdefault(key, step)
        place.buffer[:] = step.buffer
        return step._replace(buffer=place.buffer)

    replaced(runtime, upload=wrong)


def _upload_alias(base: Method, packed: Numbers, host: HostStep, key: BucketKey) -> Any:
    return base(packed, host, key)._replace(buffer=packed)


def _newest_result(runtime: Runtime) -> None:
    """Results land in one pinned buffer: who waits late reads the newest of that shape."""
    newest: dict[Any, Any] = {}

    class Late:
        def __init__(self, key: Any) -> None:
            self.key = key

        def wait(self) -> Any:
            return newest[self.key]

    def wrong(base: Method, value: Any) -> Any:
        found = base(value).wait()
        key = str([getattr(x, "shape", None) for x in found]) if isinstance(found, tuple) else "one"
        newest[key] = found
        return Late(key)

    replaced(runtime, fetch=wrong)


def _apply_once_a_step(runtime: Runtime) -> None:
    """Of several calls of `apply` in a row only the first is run."""
    last: list[str] = []

    def wrong(base: Method, program: Program, key: BucketKey | None) -> Any:
        run = base(program, key)

        def counted(*args: Any) -> Any:
            is_again = program.name == "apply" and last[-1:] == ["apply"]
            last.append(program.name)
            return (args[0],) if is_again else run(*args)

        return counted

    replaced(runtime, compile=wrong)


def _tables_cached(runtime: Runtime) -> None:
    """Plans of decode-only steps are kept while the rows stay the same."""
    kept: dict[Any, Any] = {}

    def wrong(
        base: Method, state: Any, view: Any, step: Any, key: Any, part: Any, specs: Any, groups: Any
    ) -> Any:
        plans = base(state, view, step, key, part, specs, groups)
        rows = tuple(step.row.tolist())
        if step.split[0] != step.split[2] or not len(rows):
            kept.clear()
            return plans
        old: Any = kept.setdefault((rows, specs), plans)
        return tuple(
            type(new)((new.arrays[0], before.arrays[1], *new.arrays[2:]), new.spec, new.group)
            for new, before in zip(plans, old)
        )

    replaced(runtime.attention, plan=wrong)


FAULTS = (
    _wrong(
        "serve_seed_of_first_owner",
        "a row keeps the seed of its first owner",
        _columns_of_first_owner(Column.SEED_LOW, Column.SEED_HIGH),
    ),
    _wrong(
        "serve_temperature_of_first_owner",
        "a row keeps the temperature of its first owner",
        _columns_of_first_owner(Column.TEMPERATURE),
    ),
    _wrong(
        "serve_bias_slot_of_first_owner",
        "a row keeps the bias slot of its first owner",
        _columns_of_first_owner(Column.BIAS_SLOT),
    ),
    _wrong(
        "serve_penalties_of_first_owner",
        "a row keeps the penalties of its first owner",
        _columns_of_first_owner(Column.PRESENCE, Column.FREQUENCY, Column.REPETITION),
    ),
    _wrong(
        "serve_reset_late", "parameters of a reused row arrive one step late", planted(_reset_late)
    ),
    _wrong("serve_bias_once", "a bias slot keeps its first content", planted(_bias_once)),
    _wrong(
        "serve_output_forgotten",
        "after preemption penalties forget the output",
        ops(expand=_output_forgotten),
    ),
    _wrong(
        "serve_hit_rounded",
        "after a prefix hit positions are rounded to 32",
        _positions(_hit_in_blocks),
    ),
    _wrong(
        "serve_chunk_from_zero",
        "later chunks of a mixed step begin at 0",
        _positions(_chunk_from_zero),
    ),
    _wrong("serve_position_drift", "every 50 tokens a position is lost", _positions(_drift)),
    _wrong(
        "serve_many_decode",
        "with more than eight decoding rows the ninth copies the first",
        ops(advance=_many_decode),
    ),
    _wrong(
        "serve_mixed_step",
        "in a mixed step the last decoding row keeps its old token",
        ops(advance=_mixed_step),
    ),
    _wrong("serve_by_batch", "logits waver with the number of rows", ops(logits=_by_batch)),
    _wrong("serve_by_row", "logits waver with the row", ops(logits=_by_row)),
    _wrong(
        "serve_after_three_steps",
        "after three calls row 0 has the last row's logits",
        planted(_after_steps(3)),
    ),
    _wrong(
        "serve_after_forty_steps",
        "after forty calls row 0 has the last row's logits",
        planted(_after_steps(40)),
    ),
    _wrong("serve_slow_drift", "attention grows by 0.2 % a position", planted(_slow_drift)),
    _wrong(
        "serve_full_blocks_kept",
        "copies of full blocks outlive their owner",
        planted(_full_blocks_kept),
        True,
    ),
    _wrong(
        "serve_loop_index",
        "layers address the cache by their place in the model",
        ops(layers=_loop_index),
    ),
    _wrong(
        "serve_one_layer_of_cache",
        "the last two layers share a cache",
        ops(layers=_one_layer_of_cache),
    ),
    _wrong(
        "serve_first_params", "from the third layer on weights repeat", ops(layers=_first_params)
    ),
    _wrong("serve_by_tokens", "compiled steps are kept by tokens only", planted(_by_tokens)),
    _wrong(
        "serve_features_forgotten",
        "compiled steps are kept without their features",
        planted(_features_forgotten),
    ),
    _wrong(
        "serve_one_staging_buffer",
        "a second upload overwrites the first",
        planted(_one_staging_buffer),
    ),
    _wrong(
        "serve_upload_alias", "upload keeps the host's array", runtime_with(upload=_upload_alias)
    ),
    _wrong("serve_newest_result", "a late wait reads the newest result", planted(_newest_result)),
    _wrong("serve_apply_once", "a second apply in a row is dropped", planted(_apply_once_a_step)),
    _wrong(
        "serve_tables_cached", "a decoding batch keeps its first tables", planted(_tables_cached)
    ),
)
