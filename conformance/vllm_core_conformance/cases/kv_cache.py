"""A cache on the device beside its model on the host: imports, copies and exports, bit for bit.

Knows: blocks, layers, groups, pools. Does not know: layouts, which sequences of calls hurt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import KVGroup
from vllm_core_conformance.case import Evidence, require
from vllm_core_conformance.inputs import LARGEST, Random
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
        self.content: list[Blocks] = [
            {name: self._zeros(group) for name in "kv"} for group in self.groups
        ]
        self.known = [np.zeros(num_blocks, bool) for _ in self.groups]
        self.handed: list[tuple[str, Numbers, Numbers]] = []
        """Exports that the caller still holds, and what they were when they came."""

    def _zeros(self, group: KVGroup) -> Numbers:
        spec = group.spec
        lead = (group.layers, self.num_blocks, group.block_tokens, spec.num_kv_heads)
        return np.zeros((*lead, spec.dim_qk), self.dtype)

    def draw(self, rng: Random, group: KVGroup, count: int) -> Blocks:
        """Numbers of every size; signed zeros, the largest, what is not finite, subnormal ones."""
        shape = (group.layers, count, *self._zeros(group).shape[2:])
        found = {}
        for name in "kv":
            x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 7, shape)
            x[rng.random(shape) < 0.02] = -0.0
            top = LARGEST.get(self.target.dtype, 3.4e38)
            x[rng.random(shape) < 0.02] = top
            for odd in (np.nan, np.inf, -np.inf, SMALLEST_NORMAL[self.target.dtype] / 4):
                x[rng.random(shape) < 0.005] = odd
            with np.errstate(all="ignore"):
                found[name] = x.astype(self.dtype)
        return found

    def put(self, index: int, ids: Sequence[int], blocks: Blocks) -> None:
        with calling("import_blocks"):
            held = {name: np.array(x) for name, x in blocks.items()}
            self.kv = self.attention.import_blocks(self.kv, self.groups[index], ids, held)
        for x in held.values():
            x[...] = 7  # the arrays are the caller's again
        for name in "kv":
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
            for name in "kv":
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
        require(set(found) == {"k", "v"}, f"export_blocks gave {sorted(found)}, not k and v")
        for name in "kv":
            got = np.asarray(found[name])
            require(
                got.dtype == self.dtype,
                f"export_blocks gave {name} as {got.dtype}, the cache is of {self.dtype}",
            )
            want = self.content[index][name][:, list(ids)]
            if len(self.handed) < HANDED:
                self.handed.append((f"{name} of group {group.id}", got, np.array(got)))
            if got.shape == want.shape and got.tobytes() == want.tobytes():
                evidence.checks += got.size
                continue
            label = f"{what}: {name} of group {group.id}, blocks {list(ids)[:6]}"
            evidence += require_equal(wide(got), wide(want), label, axes=AXES, nan_equal=True)
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
                axes=AXES,
                nan_equal=True,
            )
        return evidence
