"""Plays one step of a model whose layers attend in different ways: many specs planned together.

Kinds of one window and one shape of heads form a KV group, as models of full and windowed layers
do; full layers have a pool of their own, windowed ones of one shape share another, of another size.
Everything that a kind adds (window, softcap, sinks, lse) is left out where the backend does
not declare it.

Knows: kinds of layers, groups, pools. Does not know: lengths that hurt, what is judged.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import DeviceStep, KVGroup, StepLayout
from vllm_core.ops import DeviceState
from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.attention_check import unit, verify_out, verify_padding
from vllm_core_conformance.inputs import REGIMES, Random, fill, lay_out
from vllm_core_conformance.oracle.attention import attention
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.steps import VOCAB, Scene, Seen, Shape, Stage
from vllm_core_conformance.target import Target, calling, wide

Numbers = NDArray[Any]
Rows = Sequence[tuple[int, int]]

AXES = ("block", "layer", "slot", "head", "dim")


@dataclass(frozen=True)
class Kind:
    """One layer, beside what all layers of the model share."""

    scale: float = 0.12
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lse: bool = False
    regime: str = "normal"
    heads: tuple[int, int] | None = None
    """(Hq, Hkv), where they are not the model's."""
    dim: int | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """What layers of one KV group have in common."""
        return self.window, self.heads, self.dim

    @property
    def says(self) -> str:
        heads = self.heads or (0, 0)
        parts = ["" if self.heads is None else f"{heads[0]} heads on {heads[1]} KV heads"]
        parts += ["" if self.dim is None else f"heads of {self.dim}"]
        parts += ["" if self.window is None else f"a window of {self.window}"]
        parts += ["" if self.softcap is None else f"softcap {self.softcap}"]
        parts += ["sinks" if self.sinks else "", f"scale {self.scale}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Model:
    """What its layers share; hashable, for the program's tag."""

    name: str
    kinds: tuple[Kind, ...]
    heads: tuple[int, int]
    dim: int
    block_tokens: int
    tokens: int
    rows: int
    longest: int
    total: int
    """Tokens of all sequences, beside a block or two for each."""
    causal: bool = True
    pool_blocks: int = 0
    """Of the full layers' pool, if more than the rows need."""
    spare_layers: int = 0
    """Of the groups with the model's own heads, in front of those that are used."""

    def allowed(self, target: Target) -> Model:
        """Without what the backend does not declare; kinds that become equal are one."""
        caps = target.caps
        found: list[Kind] = []
        for kind in self.kinds:
            if (kind.window is not None and not caps.windows) or (kind.sinks and not caps.sinks):
                continue
            if (kind.dim or self.dim) > caps.max_head_dim:
                continue
            softcap = kind.softcap if caps.softcap else None
            kind = replace(kind, softcap=softcap, lse=kind.lse and caps.return_lse)
            if all(_spec_of(kind) != _spec_of(other) for other in found):
                found.append(kind)
        return replace(self, kinds=tuple(found))

    @property
    def groups(self) -> list[tuple[Any, ...]]:
        """One per KV group."""
        return list(dict.fromkeys(kind.group for kind in self.kinds))

    def shape(self, kind: Kind) -> Shape:
        """Of one layer, with the ids of its own group only."""
        same = [other for other in self.kinds if other.group == kind.group]
        spare = 0 if kind.heads else self.spare_layers
        blocks = ceil(self.total / self.block_tokens) + self.rows + 4
        return Shape(
            *(kind.heads or self.heads),
            kind.dim or self.dim,
            self.block_tokens,
            blocks,
            self.tokens,
            self.rows,
            ceil(self.longest / self.block_tokens) + 2,
            kind.scale,
            window=kind.window,
            softcap=kind.softcap,
            causal=self.causal,
            sinks=kind.sinks,
            return_lse=kind.lse,
            layers=len(same) + spare,
            layer=same.index(kind) + spare,
        )


def _spec_of(kind: Kind) -> tuple[Any, ...]:
    return kind.scale, kind.group, kind.softcap, kind.sinks


class HybridStage(Stage):
    """A cache of several groups; a scene per kind, of which each group's first gives the
    tables."""

    def __init__(self, target: Target, model: Model, rng: Random) -> None:
        self.target, self.model, self.rng = target, model, rng
        self.shapes = [model.shape(kind) for kind in model.kinds]
        self.shape = self.shapes[0]
        self.groups = self._groups()
        sizes = self._pool_sizes()
        self.ids = self._ids_of(sizes)
        with calling("alloc"):
            self.kv = target.runtime.attention.alloc(self.groups, sizes)
        self.state = self._new_state()
        self.tables: list[Numbers] = []

    def _groups(self) -> tuple[KVGroup, ...]:
        found: list[KVGroup] = []
        pools: dict[tuple[Any, ...], int] = {}
        for index, facts in enumerate(self.model.groups):
            kind = next(kind for kind in self.model.kinds if kind.group == facts)
            shape = self.model.shape(kind)
            spec = replace(shape.spec(self.target.dtype), group=index)
            # blocks of one shape share a pool, but for those of full layers
            same = kind.window is None, shape.layers, spec.num_kv_heads, spec.dim_qk
            name: Any = "full" if kind.window is None else "window"
            pool = pools.setdefault(same, len(pools))
            size = self.model.block_tokens
            found.append(KVGroup(index, name, size, shape.layers, spec, pool))
        return tuple(found)

    def _pool_sizes(self) -> dict[int, int]:
        """A pool holds what its groups need, and no two have one size."""
        sizes: dict[int, int] = {}
        for group in self.groups:
            sizes[group.pool] = sizes.get(group.pool, 1 + 5 * group.pool) + self.shape.num_blocks
        first = self.groups[0]
        if self.model.pool_blocks > sizes[first.pool]:
            sizes[first.pool] = self.model.pool_blocks
        return sizes

    def _ids_of(self, sizes: dict[int, int]) -> list[Numbers]:
        """Per group, where each id of its scenes stands in the pool; 0 is 0, the last is used."""
        count, taken, found = self.shape.num_blocks, dict.fromkeys(sizes, 0), []
        order = {pool: self._order(size) for pool, size in sizes.items()}
        for group in self.groups:
            at = taken[group.pool]
            taken[group.pool] += count - 1
            found.append(np.concatenate(([0], order[group.pool][at : at + count - 1])))
        return found

    def _order(self, size: int) -> Numbers:
        """All ids but 0, the last among the first few."""
        ids = 1 + self.rng.permutation(size - 1)
        last = int(np.flatnonzero(ids == size - 1)[0])
        ids[[0, last]] = ids[[last, 0]]
        return ids

    # ---- scenes
    def scenes(self, rows: Rows) -> list[Scene]:
        """One per kind: the same rows, each group's cache its own."""
        rng, model = self.rng, self.model
        found: list[Scene] = []
        firsts: dict[tuple[Any, ...], Scene] = {}
        for kind, shape in zip(model.kinds, self.shapes, strict=True):
            layout = lay_out(shape, rng, rows, share=True)
            first = firsts.get(kind.group)
            if first is not None:  # its cache is drawn already
                layout = replace(layout, shape=replace(shape, num_blocks=1, layers=1))
            scene = fill(layout, rng, REGIMES[kind.regime], self.target.round, self.target.dtype)
            first = firsts.setdefault(kind.group, scene)
            found.append(
                replace(
                    scene,
                    shape=shape,
                    state_rows=found[0].state_rows if found else scene.state_rows,
                    tables=first.tables,
                    keys=first.keys,
                    values=first.values,
                    padding=float("nan"),
                )
            )
        return found

    def play_all(self, scenes: list[Scene]) -> tuple[list[tuple[Any, Any]], list[Any]]:
        """(out, lse) of each kind, and each group's cache (K, V) after the step."""
        target, first = self.target, scenes[0]
        firsts = self._firsts(scenes)
        self.state = self._new_state()
        for index, (group, scene) in enumerate(zip(self.groups, firsts, strict=True)):
            arrays = self.host(scene)
            ids = [int(i) for i in self.ids[index][1:]]
            with calling("import_blocks"):
                self.kv = target.runtime.attention.import_blocks(self.kv, group, ids, arrays)
        self.tables = [
            self.ids[index][scene.tables].astype(np.int32) for index, scene in enumerate(firsts)
        ]
        key = self.key(first)
        sizes = (self.shape.block_tokens,) * len(self.groups)
        layout = StepLayout(key, self.shape.rows_for_life, 0, 0, sizes)
        device_step = self._upload(first, layout)
        arguments = [
            tuple(target.array(self._padded(x, s, key.tokens)) for x in (s.q, s.k, s.v))
            + (() if s.sinks is None else (target.array(s.sinks),))
            for s in scenes
        ]
        tag = ("attend hybrid", self.model, key)
        count = len(scenes) + sum(kind.lse for kind in self.model.kinds)
        program = self._hybrid_program(layout)
        run = target.compile(tag, program, name="step", consumes=(0, 1), num_results=count, key=key)
        with calling("attention of several layers"):
            results = run(self.state, self.kv, device_step, tuple(arguments))
        self.state, self.kv = results[:2]
        flat = iter(target.fetch(tuple(results[2:])))
        outs = [(next(flat), next(flat) if kind.lse else None) for kind in self.model.kinds]
        return outs, [self._exported(index) for index in range(len(self.groups))]

    def _firsts(self, scenes: Sequence[Scene]) -> list[Scene]:
        kinds = self.model.kinds
        return [
            next(s for kind, s in zip(kinds, scenes, strict=True) if kind.group == facts)
            for facts in self.model.groups
        ]

    def _apply_tag(self) -> Hashable:
        return ("apply hybrid", self.model)

    def _cells(self, scene: Scene) -> list[Numbers]:
        """[C, 3] (row, column, block) of every group."""
        n, width = self.tables[0].shape
        rows, columns = np.repeat(scene.state_rows, width), np.tile(np.arange(width), n)
        return [np.stack((rows, columns, t.ravel()), 1).astype(np.int32) for t in self.tables]

    def _hybrid_program(self, layout: StepLayout) -> Any:
        runtime, groups, kinds = self.target.runtime, self.groups, self.model.kinds
        ops, provider, tables = runtime.ops, runtime.attention, runtime.block_tables
        every = self.model.groups
        specs = tuple(
            replace(shape.spec(self.target.dtype), group=every.index(kind.group))
            for kind, shape in zip(kinds, self.shapes, strict=True)
        )
        places = [shape.layer for shape in self.shapes]

        def fn(
            state: DeviceState, kv: Any, device_step: DeviceStep, arguments: Any
        ) -> tuple[Any, ...]:
            step = layout.unpack(device_step.buffer)
            view, state = ops.expand(tables, state, step, layout.block_tokens, VOCAB)
            part = device_step.host_part
            plans = provider.plan(state, view, step, layout.key, part, specs, groups)
            results = []
            for i, kind in enumerate(kinds):
                q, k, v, *sinks = arguments[i]
                more: dict[str, Any] = {"sinks": sinks[0]} if kind.sinks else {}
                if kind.lse:
                    more["return_lse"] = True
                out, lse, kv = provider.attend(kv, places[i], q, k, v, plans[i], **more)
                results += [out, lse] if kind.lse else [out]
            return (state, kv, *results)

        return fn

    def _exported(self, index: int) -> tuple[Numbers, Numbers]:
        ids = [int(i) for i in self.ids[index][1:]]
        with calling("export_blocks"):
            found = self.target.runtime.attention.export_blocks(self.kv, self.groups[index], ids)
        keys, values = (np.moveaxis(wide(found[name]), 0, 1) for name in "kv")
        return keys, values

    # ---- judgement
    def verify_all(self, rows: Rows, where: str) -> Evidence:
        """One step of these rows; Failed names the kind of layer that is wrong."""
        scenes, evidence = self.scenes(rows), Evidence()
        outs, caches = self.play_all(scenes)
        after = [[scene.keys.copy(), scene.values.copy()] for scene in self._firsts(scenes)]
        for kind, scene, (out, lse) in zip(self.model.kinds, scenes, outs, strict=True):
            wanted = attention(scene, unit(self.target), self.target.caps.numeric_class)
            seen = Seen(wide(out), None if lse is None else wide(lse), scene.keys, scene.values)
            try:
                evidence += verify_padding(scene, seen)
                evidence += verify_out(self.target, scene, seen, wanted, f"{where}: {kind.says}")
            except Failed as failure:
                count = len(self.model.kinds)
                many = f"; one of {count} kinds of layers, planned together" if count > 1 else ""
                raise Failed(failure.sentence + many, **failure.details) from None
            layer, group = scene.shape.layer, self.model.groups.index(kind.group)
            for cache, new in zip(after[group], (wanted.keys, wanted.values), strict=True):
                cache[:, layer] = new[:, layer]
        for index, (found, exact) in enumerate(zip(caches, after, strict=True)):
            for name, got, want in zip("KV", found, exact, strict=True):
                what = f"{where}: {name} of KV group {index} after the step"
                evidence += require_equal(got, want[1:], what, axes=AXES)
        return evidence
