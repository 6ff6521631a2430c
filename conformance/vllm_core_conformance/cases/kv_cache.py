"""A cache on the device beside its model on the host: imports, copies and exports, bit for bit.

Knows: blocks, layers, groups, pools. Does not know: layouts, which sequences of calls hurt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import INT8_KV, KVGroup
from vllm_core_conformance.case import Evidence, require
from vllm_core_conformance.inputs import LARGEST, Random
from vllm_core_conformance.oracle import kv8
from vllm_core_conformance.score import SMALLEST_NORMAL, require_equal
from vllm_core_conformance.target import Target, calling, numpy_dtype, wide

Numbers = NDArray[Any]
Blocks = dict[str, Numbers]

AXES = ("layer", "block", "token", "head", "dim")
HANDED = 4
"""So many exports are kept and looked at again."""


class Cache:
    """A cache on the device beside what must be in it: [layers, num_blocks, BT, Hkv, D] by
    group."""

    def __init__(self, target: Target, groups: Sequence[KVGroup], num_blocks: int) -> None:
        self.target, self.groups, self.num_blocks = target, tuple(groups), num_blocks
        self.dtype = numpy_dtype(target.dtype)
        self.attention = target.runtime.attention
        with calling("alloc"):
            self.kv = self.attention.alloc(self.groups, {g.pool: num_blocks for g in groups})
        self.names = kv8.NAMES if groups[0].spec.kv == INT8_KV else ("k", "v")
        self.content: list[Blocks] = [
            {name: self._zeros(group, name) for name in self.names} for group in self.groups
        ]
        self.known = [np.zeros(num_blocks, bool) for _ in self.groups]
        self.handed: list[tuple[str, Numbers, Numbers]] = []
        """Exports that the caller still holds, and what they were when they came."""

    def _zeros(self, group: KVGroup, name: str) -> Numbers:
        spec = group.spec
        lead = (group.layers, self.num_blocks, group.block_tokens, spec.num_kv_heads)
        if name.endswith("_scale"):
            return np.zeros(lead, np.float32)
        return np.zeros((*lead, spec.dim_qk), self._dtype(name))

    def _dtype(self, name: str) -> np.dtype[Any]:
        if self.names == kv8.NAMES:
            return np.dtype(np.float32 if name.endswith("_scale") else np.int8)
        return self.dtype

    def draw(self, rng: Random, group: KVGroup, count: int) -> Blocks:
        """Numbers of every size; signed zeros, the largest, what is not finite, subnormal ones."""
        found = {}
        for name in self.names:
            shape = (group.layers, count, *self._zeros(group, name).shape[2:])
            if self._dtype(name) == np.int8:
                found[name] = rng.integers(-128, 128, shape).astype(np.int8)
                continue
            x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 7, shape)
            x[rng.random(shape) < 0.02] = -0.0
            dtype = self._dtype(name).name
            top = LARGEST.get(dtype, 3.4e38)
            x[rng.random(shape) < 0.02] = top
            for odd in (np.nan, np.inf, -np.inf, SMALLEST_NORMAL[dtype] / 4):
                x[rng.random(shape) < 0.005] = odd
            with np.errstate(all="ignore"):
                found[name] = x.astype(self._dtype(name))
        return found

    def put(self, index: int, ids: Sequence[int], blocks: Blocks) -> None:
        with calling("import_blocks"):
            held = {name: np.array(x) for name, x in blocks.items()}
            self.kv = self.attention.import_blocks(self.kv, self.groups[index], ids, held)
        for x in held.values():
            x[...] = 7  # the arrays are the caller's again
        for name in self.names:
            self.content[index][name][:, list(ids)] = blocks[name]
        self.known[index][list(ids)] = True
        self.forget(index, ids)

    def copy(self, index: int, src: Sequence[int], dst: Sequence[int]) -> None:
        arrays = [self.target.array(np.array(x, np.int32)) for x in (src, dst)]
        with calling("copy_blocks"):
            self.kv = self.attention.copy_blocks(self.kv, self.groups[index], *arrays)
        real = [(a, b) for a, b in zip(src, dst) if b]
        old = {name: x.copy() for name, x in self.content[index].items()}
        for a, b in real:
            for name in self.names:
                self.content[index][name][:, b] = old[name][:, a]
        self.forget(index, [b for _, b in real])

    def forget(self, index: int, ids: Sequence[int]) -> None:
        """Other groups of the pool hold something else in these blocks now."""
        for other, group in enumerate(self.groups):
            if other != index and group.pool == self.groups[index].pool:
                self.known[other][list(ids)] = False

    def require(self, index: int, ids: Sequence[int], what: str) -> Evidence:
        """Exported blocks are what they must be, in the order of the ids."""
        group, evidence = self.groups[index], Evidence()
        with calling("export_blocks"):
            found = self.attention.export_blocks(self.kv, group, list(ids))
        require(
            set(found) == set(self.names),
            f"export_blocks gave {', '.join(sorted(found))}, not {', '.join(self.names)}",
        )
        for name in self.names:
            got = np.asarray(found[name])
            require(
                got.dtype == self._dtype(name),
                f"export_blocks gave {name} as {got.dtype}, the cache is of {self._dtype(name)}",
            )
            want = self.content[index][name][:, list(ids)]
            if len(self.handed) < HANDED:
                self.handed.append((f"{name} of group {group.id}", got, np.array(got)))
            if got.shape == want.shape and got.tobytes() == want.tobytes():
                evidence.checks += got.size
                continue
            axes = AXES[: want.ndim]
            label = f"{what}: {name} of group {group.id}, blocks {list(ids)[:6]}"
            evidence += require_equal(wide(got), wide(want), label, axes=axes, nan_equal=True)
        return evidence

    def require_all(self, what: str) -> Evidence:
        evidence = Evidence()
        for index in range(len(self.groups)):
            ids = [int(i) for i in np.flatnonzero(self.known[index])]
            if ids:
                evidence += self.require(index, ids, what)
        for label, got, then in self.handed:
            evidence += require_equal(
                wide(got),
                wide(then),
                f"{label}, exported earlier and still held by the caller; {what}",
                axes=AXES[: got.ndim],
                nan_equal=True,
            )
        return evidence
