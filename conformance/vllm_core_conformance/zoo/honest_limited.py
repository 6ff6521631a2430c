"""Honest backends with narrow limits, which refuse whatever the seam does not promise them.

What a suite asks beyond a declared limit is an alarm of the suite's own making: these find it.

Knows: kernels, runtimes, what a step may hold. Does not know: cases, faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vllm_core.backend import (
    KV,
    AttentionPlan,
    AttentionSpec,
    BucketPolicy,
    DeviceStep,
    HostStep,
    KVGroup,
    MemoryReport,
    OpenConfig,
    StepConstraints,
)
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import BucketKey, HostArray
from vllm_core_conformance.zoo.kernel import HostLengths, Kernel, Row
from vllm_core_conformance.zoo.runtime import BucketRuntime, GraphRuntime, ZooRuntime

GIB = 1 << 30


def _refuse_unless(claim: bool, text: str) -> None:
    if not claim:
        raise InvalidArgument(text)


class LargeBlockKernel(Kernel):
    """Blocks of 64 tokens only."""

    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (64,)

    def _shape(self, group: KVGroup) -> tuple[int, ...]:
        if group.block_tokens != 64:
            raise NotSupported(f"blocks of {group.block_tokens} tokens; 64 is what there is")
        return super()._shape(group)


class ApartRuntime(BucketRuntime):
    """Prompts and decoding rows in steps of their own, one prompt at a time, in chunks of 32, at
    most 128 tokens; its buckets end there too."""

    ATTENTION = LargeBlockKernel
    LIMITS = StepConstraints(mixed_ok=False, max_prefills=1, chunk_multiple=32, max_tokens=128)

    def constraints(self) -> StepConstraints:
        return self.LIMITS

    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        usual = super().buckets(max_tokens, max_rows, max_width)
        return replace(usual, tokens=(8, 128), rows=(max(8, max_rows),))

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        query = np.asarray(host.query_len)
        starts = packed[key.rows : key.rows + len(query)]
        num_decoding = int((packed[2 * key.rows + 1 :][starts] == -1).sum())
        _refuse_unless(query.sum() <= 128, f"{query.sum()} tokens in a step; 128 are declared")
        _refuse_unless((query > 1).sum() <= 1, f"prompts of {query.tolist()} tokens in a step")
        _refuse_unless(
            num_decoding in (0, len(query)), f"{num_decoding} of {len(query)} rows decode"
        )
        return super().upload(packed, host, key)


class PaddedKernel(Kernel):
    """Heads are kept 64, 128 or 256 wide. No odd ones, and no argument that is not declared."""

    def _shape(self, group: KVGroup) -> tuple[int, ...]:
        spec = group.spec
        if spec.dim_qk % 2 or spec.dim_qk > 256 or spec.dim_v != spec.dim_qk or spec.sinks:
            raise NotSupported("even heads of one width up to 256, without sinks")
        return (*super()._shape(group)[:-1], self._width(spec.dim_qk))

    def _width(self, dim: int) -> int:
        return next(width for width in (64, 128, 256) if width >= dim)

    def stored(self, x: HostArray) -> HostArray:
        missing = self._width(x.shape[-1]) - x.shape[-1]
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        found = super().export_blocks(kv, group, ids)
        for x in found.values():
            x.setflags(write=False)
        return {name: x[..., : group.spec.dim_qk] for name, x in found.items()}

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        wider = {name: self.stored(x) for name, x in arrays.items()}
        return super().import_blocks(kv, group, ids, wider)

    def gather(
        self, cache: HostArray, layer: int, row: Row, j: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray]:
        keys, values = super().gather(cache, layer, row, j, plan)
        return keys[..., : plan.spec.dim_qk], values[..., : plan.spec.dim_qk]

    def attend(  # type: ignore[override]
        self, kv: KV, layer: int, q: HostArray, k: HostArray, v: HostArray, plan: AttentionPlan
    ) -> tuple[HostArray, HostArray | None, KV]:
        return super().attend(kv, layer, q, k, v, plan)


class PaddedRuntime(ZooRuntime):
    """One dtype of 16 bits, memory of its own, few rows of logits."""

    ATTENTION = PaddedKernel
    CAPS = replace(
        ZooRuntime.CAPS,
        dtypes=frozenset({"bfloat16"}),
        default_dtype="bfloat16",
        sinks=False,
        return_lse=False,
        shares_host_memory=False,
        max_logit_rows=256,
    )

    def memory(self) -> MemoryReport:
        return MemoryReport(80 * GIB, 40 * GIB)


class WaryRuntime(GraphRuntime):
    """Takes buckets that it named, and steps that are packed as the seam says."""

    ATTENTION = HostLengths

    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.named: set[BucketPolicy] = set()

    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        tokens, rows = (
            (size, -(-most // size) * size) for size, most in ((8, max_tokens), (4, max_rows))
        )
        policy = BucketPolicy(tokens=tokens, rows=rows, widths=(max_width,))
        self.named.add(policy)
        return policy

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        _refuse_unless(
            any(policy.cover(key) == key for policy in self.named), f"{key} is no bucket of mine"
        )
        query, length, n = host.query_len, host.seq_len, len(host.query_len)
        row, start = np.split(packed[: 2 * key.rows + 1], [key.rows])
        single = int((query == 1).sum())
        for claim, what in (
            (n > 0 and (query > 0).all() and (length >= query).all(), "lengths"),
            (n <= key.rows and query.sum() <= key.tokens, "a step larger than its bucket"),
            ((query[:single] == 1).all(), "rows of one token behind others"),
            (host.split == (single, single, n), "the split"),
            (start[0] == 0 and (np.diff(start[: n + 1]) == query).all(), "query_start"),
            ((start[n:] == query.sum()).all(), "query_start of padding"),
            (len(np.unique(row[:n])) == n and (row[n:] > row[:n].max()).all(), "rows"),
        ):
            _refuse_unless(bool(claim), f"{what} of {query.tolist()}, {length.tolist()}")
        return super().upload(packed, host, key)


LIMITED = {
    "honest_apart": ApartRuntime,
    "honest_padded": PaddedRuntime,
    "honest_wary": WaryRuntime,
}
LIMITED_DTYPES = {
    "honest_apart": ("float32",),
    "honest_padded": ("bfloat16",),
    "honest_wary": ("float32", "float16"),
}
"""In which each is judged: their limits hold in all."""
