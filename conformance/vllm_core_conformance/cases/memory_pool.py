"""Caches of a given size for the cases of memory, and what a process holds.

Knows: sizes, how to ask for what is held. Does not know: what must hold (memory).
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup
from vllm_core_conformance.case import Evidence, require
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Target, calling, numpy_dtype, wide

Numbers = NDArray[Any]

MIB = 1 << 20
BUDGET = 128 * MIB
SLACK = 40 * MIB
"""What a process may grow by for reasons of its own while a cache is allocated and filled."""
CHUNK = 64
"""Blocks written at a time."""
INSANE = 1 << 60
"""Bytes that no machine can even address."""


def held(target: Target) -> int:
    """Bytes that this process holds of the device's memory."""
    gc.collect()
    if target.caps.shares_host_memory:
        _trim()
        return int(psutil.Process().memory_info().rss)
    with calling("memory"):
        report = target.runtime.memory()
    return report.total - report.free


def _trim() -> None:
    """Gives what the C allocator keeps for later back, where it can be asked to."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Pool:
    """A group whose cache of `num_blocks` takes about `budget` bytes, as the backend tells."""

    target: Target
    group: KVGroup
    num_blocks: int

    @staticmethod
    def of(target: Target, budget: int) -> Pool:
        group = group_of(target, heads=4, dim=64, layers=4)
        with calling("block_bytes"):
            size = target.runtime.attention.block_bytes(group)
        require(isinstance(size, int) and size > 0, f"block_bytes is {size!r}, not a number > 0")
        return Pool(target, group, max(4, budget // size))

    def alloc(self) -> Any:
        with calling("alloc"):
            return self.target.runtime.attention.alloc((self.group,), {0: self.num_blocks})

    def content(self, rng: np.random.Generator) -> dict[str, Numbers]:
        """Of CHUNK blocks; `fill` marks each block with its id."""
        spec = self.group.spec
        shape = (self.group.layers, CHUNK, self.group.block_tokens, spec.num_kv_heads, spec.dim_qk)
        kind = numpy_dtype(self.target.dtype)
        return {name: rng.standard_normal(shape, np.float32).astype(kind) for name in ("k", "v")}

    def marked(self, content: dict[str, Numbers], ids: list[int]) -> dict[str, Numbers]:
        """The content for these ids: exact in every dtype, and different for each block."""
        found = {name: np.array(x[:, : len(ids)]) for name, x in content.items()}
        for x in found.values():
            x[:, :, -1, -1, 0] = np.array(ids) % 251
            x[:, :, 0, 0, -1] = np.array(ids) // 251 % 251
        return found

    def write(self, kv: Any, ids: list[int], content: dict[str, Numbers]) -> Any:
        with calling("import_blocks"):
            attention = self.target.runtime.attention
            return attention.import_blocks(kv, self.group, ids, self.marked(content, ids))

    def fill(self, kv: Any, content: dict[str, Numbers]) -> Any:
        """Every block but the null block."""
        for first in range(1, self.num_blocks, CHUNK):
            ids = list(range(first, min(first + CHUNK, self.num_blocks)))
            kv = self.write(kv, ids, content)
        return kv

    def check(
        self, kv: Any, ids: list[int], content: dict[str, Numbers], what: str, first: int = 0
    ) -> Evidence:
        """Blocks `ids`, written at places `first`.. of a chunk, hold what was written."""
        with calling("export_blocks"):
            found = self.target.runtime.attention.export_blocks(kv, self.group, ids)
        evidence = Evidence()
        for name, x in content.items():
            own = {name: x[:, first : first + len(ids)]}
            evidence += require_equal(
                wide(found[name]),
                wide(self.marked(own, ids)[name]),
                f"{name.upper()} of blocks {ids} {what}",
                axes=("layer", "place", "token", "head", "lane"),
            )
        return evidence


def group_of(target: Target, heads: int, dim: int, layers: int) -> KVGroup:
    spec = AttentionSpec(heads, heads, dim, dim, 0.1, KVFormat(target.dtype), group=0)
    return KVGroup(0, "full", target.usual_block(spec), layers, spec, 0)


def content_bytes(group: KVGroup, dtype: str) -> int:
    """What K and V of one block are, as they come out of export_blocks."""
    spec = group.spec
    elements = group.layers * group.block_tokens * spec.num_kv_heads * (spec.dim_qk + spec.dim_v)
    return elements * numpy_dtype(dtype).itemsize
