"""Attention through the whole seam: a scene on the host, played as one step on the device.

A `Scene` says what lies in every slot of the cache, who owns which block, and what the step's
queries, keys and values are. `Stage` plays it: tables by `apply` and by the step's own changes,
then one program `expand -> plan -> attend`, then the cache is exported again.

Knows: the seam, packing of steps. Does not know: what is right (oracle), which scenes hurt (cases).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import (
    APPLY_ROWS,
    INT8_KV,
    AttentionSpec,
    DeviceStep,
    HostStep,
    KVFormat,
    KVGroup,
    StepLayout,
)
from vllm_core.backend.lies import ARGUMENTS
from vllm_core.backend.step import scrap_params
from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, Changes, DeviceState
from vllm_core_conformance.case import Failed
from vllm_core_conformance.oracle import kv8
from vllm_core_conformance.target import Raised, Target, calling, numpy_dtype, takes, wide

Numbers = NDArray[Any]
Blocks = dict[str, Numbers]

VOCAB = 64
"""Token ids do not matter to attention."""


@dataclass(frozen=True)
class Shape:
    """What is static: one compiled program per Shape (and per width of the bucket)."""

    num_q_heads: int
    num_kv_heads: int
    dim: int
    block_tokens: int
    num_blocks: int
    """Of the group's pool, the null block included."""
    tokens: int
    """T, most tokens of a step."""
    rows: int
    """S, most rows of a step."""
    width: int
    """M, columns of a table."""
    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    sinks: bool = False
    return_lse: bool = False
    num_rows: int = 0
    """N; 0: three more than `rows`."""
    layers: int = 3
    layer: int = 1
    decoy_group: bool = False
    """Another KV group, with tables and content of its own, stands before the one that is used."""
    dim_v: int | None = None
    share_pool: bool = False
    """The decoy group draws from our pool: one id space, blocks of one shape."""
    fused: bool = False
    """q, k and v are slices of one array, as a fused projection gives them: strided, and not at the
    start of a buffer."""
    int8: bool = False
    """The cache holds codes of 8 bits, with a scale per token and KV head."""

    @property
    def rows_for_life(self) -> int:
        return self.num_rows or self.rows + 3

    @property
    def queries_per_kv(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    def spec(self, dtype: str) -> AttentionSpec:
        return AttentionSpec(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            dim_qk=self.dim,
            dim_v=self.dim_v or self.dim,
            scale=self.scale,
            kv=INT8_KV if self.int8 else KVFormat(dtype),
            group=int(self.decoy_group),
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def groups(self, dtype: str) -> tuple[KVGroup, ...]:
        """Our group last; the decoy has a pool of its own unless they share one."""
        spec = self.spec(dtype)
        kind: Any = "full" if self.window is None else "window"
        pool = 0 if self.share_pool else spec.group
        ours = KVGroup(spec.group, kind, self.block_tokens, self.layers, spec, pool)
        if not self.decoy_group:
            return (ours,)
        other = replace(spec, group=0, window=None, sinks=False, softcap=None)
        return (KVGroup(0, "full", self.block_tokens, self.decoy_layers, other, 0), ours)

    @property
    def decoy_layers(self) -> int:
        """A shared pool has blocks of one size."""
        return self.layers if self.share_pool else self.layers + 1


@dataclass
class Scene:
    """One step on the host; n real rows, t real tokens. Floats are float64, exact in the dtype.

    Rows stand in the order of the seam: those with one token first.
    """

    shape: Shape
    state_rows: Numbers
    """[n] int: row for life of each row of the step, distinct, below N."""
    cached: Numbers
    """[n] int: tokens whose KV is in the cache before the step."""
    query: Numbers
    """[n] int, at least 1: tokens of the step."""
    tables: Numbers
    """[n, M] int32: block ids by column. Cells that no visible token needs may be anything in
    0..num_blocks-1."""
    keys: Numbers
    """[num_blocks, layers, BT, Hkv, D]: the cache before the step; may hold NaN in what is unused.
    Block 0 is not written."""
    values: Numbers
    """The same for V (last axis dim_v or D)."""
    q: Numbers
    """[t, Hq, D]"""
    k: Numbers
    """[t, Hkv, D]"""
    v: Numbers
    sinks: Numbers | None = None
    """[Hq]"""
    padding: float = 0.0
    """What the q, k and v of padding tokens hold: 0, NaN, Inf, anything."""
    exact_shapes: bool = False
    """Devices that take any shape get exactly this step; else it is padded to the Shape. Devices
    with static shapes are always given the Shape's bucket."""

    @property
    def num_tokens(self) -> int:
        return int(self.query.sum())

    @property
    def seq_lens(self) -> Numbers:
        """[n] with the tokens of the step."""
        return self.cached + self.query

    @property
    def starts(self) -> Numbers:
        """[n+1] of each row's tokens in the step."""
        return np.concatenate(([0], np.cumsum(self.query)))


@dataclass
class Seen:
    """What came out, on the host; floats in float64."""

    out: Numbers
    """[T, Hq, Dv], padding included."""
    lse: Numbers | None
    """[T, Hq]"""
    keys: Numbers
    """[num_blocks, layers, BT, Hkv, D]: the cache after the step; block 0 is zeros here (its
    content is undefined)."""
    values: Numbers
    num_tokens: Numbers = field(default_factory=lambda: np.zeros(0, np.int32))
    """[N+1] of the state after `expand` (before any advance)."""
    codes: Blocks = field(default_factory=dict)
    """As exported, [num_blocks, layers, BT, Hkv, ...], where the cache holds codes; `keys` and
    `values` are then what these are worth."""


class Stage:
    """A cache and a state on the device, on which scenes of one Shape are played one after the
    other."""

    def __init__(self, target: Target, shape: Shape) -> None:
        self.target, self.shape = target, shape
        self.groups = shape.groups(target.dtype)
        self.group = self.groups[-1]
        self.num_blocks = {group.pool: shape.num_blocks for group in self.groups}
        attention = target.runtime.attention
        self.inputs: tuple[Any, ...] = ()
        """q, k, v (or all in one) of the last step, on the device."""
        with calling("alloc"):
            self.kv = attention.alloc(self.groups, self.num_blocks)
        self.state = self._new_state()

    def _new_state(self) -> DeviceState:
        ops, rows = self.target.ops, self.shape.rows_for_life
        widths = (self.shape.width,) * len(self.groups)
        with calling("making a device state"):
            return DeviceState(
                tables=self.target.runtime.block_tables.alloc(rows, widths),
                num_tokens=ops.full((rows + 1,), 0, "int32"),
                last_token=ops.full((rows + 1,), 0, "int32"),
                params=ops.asarray(np.repeat(scrap_params(0, 0)[None], rows + 1, 0)),
                history=ops.full((1, 8), 0, "int32"),
                bias=ops.full((1, VOCAB), 0.0, "float32"),
            )

    # ---- the cache
    def write_cache(self, scene: Scene) -> None:
        """Every block but the null block, as the scene has it; the decoy group gets other
        numbers."""
        attention = self.target.runtime.attention
        ids = list(range(1, self.shape.num_blocks))
        if len(self.groups) > 1:
            decoy = self._decoy_content(scene)
            with calling("import_blocks"):
                self.kv = attention.import_blocks(self.kv, self.groups[0], ids, decoy)
        arrays = self.host(scene)
        with calling("import_blocks"):
            self.kv = attention.import_blocks(self.kv, self.group, ids, arrays)

    def host(self, scene: Scene) -> Blocks:
        """The scene's cache for import_blocks: [layers, num_blocks - 1, ...]."""
        blocks = self._blocks(scene.keys, scene.values)
        return {n: np.ascontiguousarray(np.moveaxis(x[1:], 1, 0)) for n, x in blocks.items()}

    def _blocks(self, keys: Numbers, values: Numbers) -> Blocks:
        """As the cache holds them: in its dtype, or codes and scales."""
        if self.shape.int8:
            return kv8.blocks_of(keys, values)
        kind = numpy_dtype(self.target.dtype)
        with np.errstate(all="ignore"):
            return {"k": keys.astype(kind), "v": values.astype(kind)}

    def _decoy_content(self, scene: Scene) -> Blocks:
        rng = np.random.default_rng(3)
        shape = (self.shape.decoy_layers, self.shape.num_blocks - 1, *scene.keys.shape[2:])
        return self._blocks(rng.normal(size=shape), rng.normal(size=shape))

    def read_cache(self) -> Blocks:
        """What export gives, [num_blocks, layers, BT, Hkv, ...]; block 0 as zeros."""
        ids = list(range(1, self.shape.num_blocks))
        with calling("export_blocks"):
            found = self.target.runtime.attention.export_blocks(self.kv, self.group, ids)
        if self.shape.int8:
            kv8.require_names(found)

        def canonical(x: Any) -> Numbers:
            moved = np.moveaxis(wide(x), 0, 1)
            return np.concatenate((np.zeros_like(moved[:1]), moved))

        return {name: canonical(x) for name, x in found.items()}

    # ---- the step
    def key(self, scene: Scene) -> BucketKey:
        """The bucket that an engine would take for this step."""
        shape, groups = self.shape, len(self.groups)
        largest = BucketKey(shape.tokens, shape.rows, (shape.width,) * groups)
        wanted = largest
        if scene.exact_shapes and not self.target.is_static:
            columns = -(-int(scene.seq_lens.max()) // shape.block_tokens)
            wanted = BucketKey(scene.num_tokens, len(scene.query), (columns,) * groups)
        with calling("buckets"):
            policy = self.target.runtime.buckets(shape.tokens, shape.rows, shape.width)
        found = policy.cover(wanted)
        if found is None:
            raise Failed(f"no bucket covers the largest step that was announced: {largest}")
        return found

    def play(self, scene: Scene) -> Seen:
        """The step on the cache as it is; the state starts anew with the scene's rows."""
        target = self.target
        self.state = self._new_state()
        key = self.key(scene)
        layout = StepLayout(
            key, self.shape.rows_for_life, 0, 0, (self.shape.block_tokens,) * len(self.groups)
        )
        device_step = self._upload(scene, layout)
        q, k, v = (self._padded(x, scene, key.tokens) for x in (scene.q, scene.k, scene.v))
        more = () if scene.sinks is None else (target.array(scene.sinks),)
        run = target.compile(
            ("attend", self.shape, key),
            self._program(layout),
            name="step",
            consumes=(0, 1),
            num_results=3,
            key=key,
        )
        self._refuse_unknown()
        if self.shape.fused:
            arrays = [target.array(np.concatenate([x.reshape(len(x), -1) for x in (q, k, v)], 1))]
        else:
            arrays = [target.array(x) for x in (q, k, v)]
        self.inputs = tuple(arrays)
        with calling("attention"):
            results = run(self.state, self.kv, device_step, *arrays, *more)
        self.state, self.kv = results[:2]
        out, lse, num_tokens = target.fetch(tuple(results[2:]))
        held = self.read_cache()
        codes = held if self.shape.int8 else {}
        keys, values = kv8.values_of(held) if codes else (held["k"], held["v"])
        lse = None if lse is None else wide(lse)
        return Seen(wide(out), lse, keys, values, np.asarray(num_tokens), codes)

    def _refuse_unknown(self) -> None:
        """An argument of `attend` that belongs to a bit which is not declared need not be there."""
        caps, attend = self.target.caps, self.target.runtime.attention.attend
        for bit, (_, _, argument) in ARGUMENTS.items():
            if getattr(self.shape, bit) and not getattr(caps, bit) and not takes(attend, argument):
                raise Raised("attention", NotSupported(f"attend takes no argument {argument!r}"))

    def _padded(self, x: Numbers, scene: Scene, tokens: int) -> Numbers:
        padded = np.full((tokens, *x.shape[1:]), scene.padding)
        padded[: scene.num_tokens] = x
        return padded

    def _program(self, layout: StepLayout) -> Any:
        runtime, shape, groups = self.target.runtime, self.shape, self.groups
        ops, attention, tables = runtime.ops, runtime.attention, runtime.block_tables
        specs = tuple(group.spec for group in groups)  # planned together, as an engine does

        def fn(
            state: DeviceState, kv: Any, device_step: DeviceStep, *arrays: Any
        ) -> tuple[Any, ...]:
            q, k, v = _split(arrays[0], shape) if shape.fused else arrays[:3]
            step = layout.unpack(device_step.buffer)
            view, state = ops.expand(tables, state, step, layout.block_tokens, VOCAB)
            *_, plan = attention.plan(
                state, view, step, layout.key, device_step.host_part, specs, groups
            )
            more: dict[str, Any] = {"sinks": arrays[-1]} if shape.sinks else {}
            if shape.return_lse:
                more["return_lse"] = True
            out, lse, kv = attention.attend(kv, shape.layer, q, k, v, plan, **more)
            return state, kv, out, lse, state.num_tokens + 0

        return fn

    def _upload(self, scene: Scene, layout: StepLayout) -> DeviceStep:
        """Packs rows and resets; table cells beyond what a step holds go ahead through `apply`."""
        buffer = np.array(layout.template())
        v = layout.views(buffer)
        n, total = len(scene.query), scene.num_tokens
        ends = np.cumsum(scene.query)
        v["row"][:n] = scene.state_rows
        v["query_start"][1 : n + 1] = ends
        v["query_start"][n + 1 :] = total
        v["token_ids"][:total] = np.arange(total) % VOCAB
        v["logit_rows"][:n, 0] = ends - 1
        v["logit_rows"][:n, 1] = layout.key.rows
        num_single = int((scene.query == 1).sum())
        v["split"][:] = split = (num_single, num_single, n)
        v["resets"][:n, 0], v["resets"][:n, 1] = scene.state_rows, scene.cached
        v["resets"][:n, 2:] = scrap_params(0, 0)
        cells = self._cells(scene)
        room = layout.num_changes
        self._apply([changes[room:] for changes in cells])
        for g, changes in enumerate(cells):
            kept = changes[:room]
            v[f"table_changes{g}"][: len(kept)] = kept
        host = HostStep(scene.query.astype(np.int32), scene.seq_lens.astype(np.int32), split)
        with calling("upload"):
            step = self.target.runtime.upload(buffer, host, layout.key)
        buffer[:] = -(2**20)  # the array may be reused on return
        return step

    def _cells(self, scene: Scene) -> list[Numbers]:
        """[C, 3] (row, column, block) per group; the decoy's tables are ours, reversed."""
        n, width = scene.tables.shape
        rows = np.repeat(scene.state_rows, width)
        columns = np.tile(np.arange(width), n)
        ours = np.stack((rows, columns, scene.tables.ravel()), 1).astype(np.int32)
        if len(self.groups) == 1:
            return [ours]
        decoy = ours.copy()
        decoy[:, 2] = self.shape.num_blocks - 1 - np.maximum(ours[:, 2], 1) + 1
        return [decoy, ours]

    def _apply_tag(self) -> Hashable:
        return ("apply", self.shape)

    def _apply(self, changes: list[Numbers]) -> None:
        """The program `apply` in calls of APPLY_ROWS, as an engine does."""
        target, runtime, groups = self.target, self.target.runtime, len(self.groups)

        def fn(state: DeviceState, tables: Any, history: Any) -> tuple[DeviceState]:
            parts = Changes(tuple(tables[g] for g in range(groups)), history)
            return (runtime.ops.apply(runtime.block_tables, state, parts),)

        run = target.compile(self._apply_tag(), fn, name="apply", consumes=(0,), num_results=0)
        for at in range(0, max(len(c) for c in changes), APPLY_ROWS):
            tables = np.zeros((groups, APPLY_ROWS, 3), np.int32)
            tables[:, :, 0] = self.shape.rows_for_life
            for g, part in enumerate(c[at : at + APPLY_ROWS] for c in changes):
                tables[g, : len(part)] = part
            history = np.zeros((APPLY_ROWS, 3), np.int32)
            arrays = target.array(tables), target.array(history)
            with calling("apply"):
                (self.state,) = run(self.state, *arrays)


def _split(qkv: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """[T, (Hq + Hkv) D + Hkv Dv] as a model splits it."""
    tokens, dim, dim_v = qkv.shape[0], shape.dim, shape.dim_v or shape.dim
    a = shape.num_q_heads * dim
    b = a + shape.num_kv_heads * dim
    return (
        qkv[:, :a].reshape(tokens, shape.num_q_heads, dim),
        qkv[:, a:b].reshape(tokens, shape.num_kv_heads, dim),
        qkv[:, b:].reshape(tokens, shape.num_kv_heads, dim_v),
    )


def play(target: Target, scene: Scene) -> Seen:
    """One scene on a cache of its own."""
    stage = Stage(target, scene.shape)
    stage.write_cache(scene)
    return stage.play(scene)
