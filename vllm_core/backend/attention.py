"""Attention over a paged KV cache: the interface that a backend implements, and the facts it works
on.

    score(t,h,j) = scale * dot(q[t,h], K[j, h // G]);  softcap * tanh(score / softcap) if softcap
    visible(t,j): j < seq_len, pos_j <= pos_t if causal, pos_j > pos_t - window (itself counts)
    pos_t = seq_len - q_len + (t - query_start);  seq_len counts the tokens written in this step
    lse = ln sum exp(score), natural, float32, -inf and out = 0 where nothing is visible
    out = sum exp(score - lse') V;  lse' = ln(exp(lse) + exp(sink[h])) with sinks

Accumulation is in float32 or better. Slots at or past seq_len, blocks outside the window and the
null block may hold NaN or another request's data: none may change a bit of the output. Output rows
of padding tokens are 0.

Knows: specs, groups, plans. Does not know: block ids' owners, layouts other than its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vllm_core.errors import NotSupported
from vllm_core.ops import Array, BucketKey, DeviceState, HostArray, StepInput, StepView

KV = Any
"""The cache of every pool: opaque to the core, consumed and returned by programs."""


@dataclass(frozen=True)
class KVFormat:
    """How K and V are stored: in the model dtype, or, with `INT8_KV`, in codes and scales.

    All else is reserved: "int8" without scales, scales beside another dtype, v_in_k (latent
    caches).
    """

    dtype: str
    scales: bool = False
    """A float32 scale per token and KV head, one of K and one of V: `ops.quantized_kv`."""
    v_in_k: bool = False

    def is_among(self, dtype: str, kv_dtypes: frozenset[str]) -> bool:
        """Whether a backend that computes in `dtype` and declares `kv_dtypes` has it."""
        return self == KVFormat(dtype) or (self == INT8_KV and "int8" in kv_dtypes)

    def refuse_unless(self, dtype: str, kv_dtypes: frozenset[str] = frozenset()) -> None:
        """For `alloc`: NotSupported where `is_among` says no."""
        if not self.is_among(dtype, kv_dtypes):
            known = f"{dtype} or {INT8_KV}" if "int8" in kv_dtypes else dtype
            raise NotSupported(
                f"a KV cache of {self}; this backend's caches are of {known}; "
                "use kv_cache_dtype auto"
            )

    def __str__(self) -> str:
        parts = {"scales": self.scales, "V in K": self.v_in_k}
        more = " and ".join(name for name, is_there in parts.items() if is_there)
        return f"{self.dtype} with {more}" if more else self.dtype


INT8_KV = KVFormat("int8", scales=True)
"""What "int8" in `Capabilities.kv_dtypes` means. Attention reads code * scale, of this step's
tokens too: so the same tokens come out however a prompt is cut into steps."""


@dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention layer. Hashable: one plan per distinct spec."""

    num_q_heads: int
    num_kv_heads: int
    dim_qk: int
    dim_v: int
    scale: float
    kv: KVFormat
    group: int
    """Index of the KV group whose tables the layer uses."""
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    # Reserved: refused when set.
    chunk: int | None = None
    alibi: bool = False
    writes_kv: bool = True
    source: int | None = None

    @property
    def queries_per_kv(self) -> int:
        """G, query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one block table."""

    id: int
    kind: Literal["full", "window"]
    block_tokens: int
    layers: int
    """How many layers; a layer's index in its group addresses the cache."""
    spec: AttentionSpec
    """Of any layer of the group: all have the same heads, dims, format and window."""
    pool: int
    """Groups of one pool draw block ids from one id space."""

    def first_live(self, start: int) -> int:
        """First column of the table that a query at position `start` can see."""
        window = self.spec.window
        return 0 if window is None else max(0, (start - window + 1) // self.block_tokens)

    def blocks_held(self, num_tokens: int, chunk: int) -> int:
        """Most blocks that a sequence of this length ever holds when it is computed in such
        chunks."""
        full = -(-num_tokens // self.block_tokens)
        if self.spec.window is None:
            return full
        live = min(num_tokens, self.spec.window + chunk)
        return min(full, -(-live // self.block_tokens) + 1)


@dataclass(frozen=True)
class AttentionPlan:
    """What `attend` needs of one spec: arrays of this step and static facts. A pytree node
    (`arrays` its children)."""

    arrays: Any
    spec: AttentionSpec
    group: KVGroup
    static: Any = None


@dataclass(frozen=True)
class HostStep:
    """What the host knows of a step: n real rows in the order of the step."""

    query_len: HostArray
    """[n] tokens of each row in this step."""
    seq_len: HostArray
    """[n] upper bound of the length with this step's tokens; exact where nothing is drafted."""
    split: tuple[int, int, int]
    """num_decode, num_uniform, num_rows."""


class AttentionBackend(ABC):
    """Owns the layout of the cache."""

    @abstractmethod
    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        """Block sizes it can do, the preferred one first."""

    @abstractmethod
    def block_bytes(self, group: KVGroup) -> int:
        """Bytes of one block over all layers of the group, scales too; pools are sized with this
        and nothing else."""

    @abstractmethod
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        """The cache; num_blocks by pool, the null block (0) included. OutOfMemory when it does not
        fit, NotSupported for a format that is not declared."""

    @abstractmethod
    def layout_fingerprint(self, group: KVGroup) -> str:
        """Equal if and only if raw bytes of two caches are interchangeable: it names the format."""

    @abstractmethod
    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        """{"k", "v"}: [layer, block, token, head, dim] on the host, in the cache's dtype.

        With the format INT8_KV: codes int8, and "k_scale", "v_scale" float32 [layer, block, token,
        head]. A code of a slot that was never written may be anything.
        """

    @abstractmethod
    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        """The inverse of export_blocks, of the same arrays. Consumes kv."""

    @abstractmethod
    def copy_blocks(self, kv: KV, group: KVGroup, src: Array, dst: Array) -> KV:
        """Block src[i] onto dst[i] in all layers, scales too; padding copies 0 onto 0. Consumes
        kv."""

    def plan_host(self, host: HostStep, key: BucketKey) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays that follow from host knowledge, shapes fixed by the key; uploaded with the
        step."""
        return {}

    @abstractmethod
    def plan(
        self,
        state: DeviceState,
        view: StepView,
        step: StepInput,
        key: BucketKey,
        host_part: Any,
        specs: tuple[AttentionSpec, ...],
        groups: tuple[KVGroup, ...],
    ) -> tuple[AttentionPlan, ...]:
        """One plan per spec, once per step: pure, traceable, shapes fixed by the key; never waits
        for the device."""

    @abstractmethod
    def attend(
        self,
        kv: KV,
        layer: Array | int,
        q: Array,
        k: Array,
        v: Array,
        plan: AttentionPlan,
        *,
        sinks: Array | None = None,
        return_lse: bool = False,
    ) -> tuple[Array, Array | None, KV]:
        """Writes the step's K and V at their slots, then attends, ragged and mixed in one call.
        Consumes kv.

        q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], sinks [Hq] -> out [T, Hq, Dv], lse [T, Hq]
        float32 or None, kv.
        return_lse together with sinks: InvalidArgument.
        """
