"""Honest backends that compute the same in different ways: none of them may ever fail a case.

Knows: kernels, runtimes. Does not know: cases, faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vllm_core.backend import (
    KV,
    AttentionPlan,
    AttentionSpec,
    KVGroup,
    OpenConfig,
    Runtime,
)
from vllm_core.bindings.numpy import NumpyOps
from vllm_core.errors import InvalidArgument, NotSupported
from vllm_core.ops import Array, HostArray, Param
from vllm_core_conformance.zoo.coded import ApartRuntime, TileRuntime
from vllm_core_conformance.zoo.honest_limited import LIMITED, LIMITED_DTYPES
from vllm_core_conformance.zoo.kernel import HostLengths, Kernel, wide
from vllm_core_conformance.zoo.kv8 import Int8Runtime, InverseRuntime
from vllm_core_conformance.zoo.runtime import (
    BucketRuntime,
    GraphRuntime,
    Open,
    ZooRuntime,
    jax_open,
    torch_open,
)

LOG2E = np.float64(1.4426950408889634)


class FlashKernel(Kernel):
    """Tiles of 16 from the last key to the first, probabilities rounded to the model's dtype, as
    matrix units take them."""

    TILE, BACKWARDS, QUERIES = 16, True, 16

    def weighed(self, p: HostArray, values: HostArray) -> HostArray:
        return super().weighed(p.astype(self.dtype).astype(p.dtype), values)


class SplitKernel(Kernel):
    """Whole-row softmax in two, three or seven parts; more for longer rows. The head before the
    token in memory."""

    TILE = 0
    LAYOUT = (0, 1, 2, 4, 3, 5)

    def splits(self, num_keys: int) -> list[range]:
        count = 2 if num_keys < 40 else 3 if num_keys < 200 else 7
        size = max(1, -(-num_keys // count))
        return [range(i, min(num_keys, i + size)) for i in range(0, max(num_keys, 1), size)]


class WholeRowKernel(HostLengths):
    """No tiles: the scores of a row, then numpy's pairwise sums; exp by powers of two; K by columns
    of the head (dim before token)."""

    TILE, QUERIES = 0, 1 << 30
    LAYOUT = (0, 2, 1, 4, 5, 3)

    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        return np.asarray(np.einsum("hnd,hld->hnl", q, keys, optimize=False))

    def exp(self, x: HostArray) -> HostArray:
        y: HostArray = np.exp2(x * LOG2E.astype(x.dtype))
        return y

    def weighed(self, p: HostArray, values: HostArray) -> HostArray:
        return np.asarray(np.einsum("hnl,hld->hnd", p, values, optimize=False))


class BlockedOps(NumpyOps):
    """Matrix products in parts of 48 along the inner axis, norms by E[x^2] - E[x]^2 in float64,
    sums of squares backwards, sigmoid by powers of two."""

    def linear(self, x: Array, param: Param) -> Array:
        return self._product(x, param).astype(x.dtype)

    def logits(self, x: Array, param: Param) -> Array:
        return self._product(x, param)

    def _product(self, x: Array, param: Param) -> Array:
        a, b = wide(x), wide(param["weight"])
        out = np.zeros((x.shape[0], b.shape[0]), a.dtype)
        for k in range(0, a.shape[1], 48):
            out += np.einsum("ti,oi->to", a[:, k : k + 48], b[:, k : k + 48], optimize=False)
        bias = param.get("bias")
        return out if bias is None else out + wide(bias)

    def rms_norm(self, x: Array, param: Param, eps: float) -> Array:
        y = wide(x)
        mean = (y * y)[..., ::-1].mean(-1, keepdims=True)
        return (y * (1 / np.sqrt(mean + np.asarray(eps, y.dtype))) * wide(param["weight"])).astype(
            x.dtype
        )

    def layer_norm(self, x: Array, param: Param, eps: float) -> Array:
        y = x.astype(np.float64)
        mean = y.mean(-1, keepdims=True)
        variance = np.maximum((y * y).mean(-1, keepdims=True) - mean * mean, 0)
        out = wide(((y - mean) / np.sqrt(variance + eps)).astype(wide(x).dtype))
        out = out * wide(param["weight"])
        bias = param.get("bias")
        return (out if bias is None else out + wide(bias)).astype(x.dtype)

    def silu_and_mul(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        y = wide(x)
        gate = y[:, :half]
        sigmoid = 1 / (1 + np.exp2(gate * -LOG2E.astype(y.dtype)))
        return np.asarray((gate * sigmoid * y[:, half:]).astype(x.dtype))


class CoarseKernel(Kernel):
    """Scores in the model's dtype, which is class B where that has 16 bits."""

    def dot(self, q: HostArray, keys: HostArray) -> HostArray:
        return np.asarray(super().dot(q, keys).astype(self.dtype).astype(q.dtype))


class ModestKernel(Kernel):
    """Blocks of 32 and 64 only, and nothing that is optional."""

    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (32, 64)

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        for group in groups:
            if group.block_tokens not in (32, 64):
                raise NotSupported(f"blocks of {group.block_tokens} tokens; offered are 32 and 64")
            if group.spec.dim_v != group.spec.dim_qk:
                raise NotSupported("this layout needs V heads as wide as K heads")
            if group.spec.window is not None or group.spec.softcap is not None:
                raise NotSupported("no windows and no softcap here")
        return super().alloc(groups, num_blocks)

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
        if sinks is not None and return_lse:
            raise InvalidArgument("return_lse with sinks")
        if sinks is not None or return_lse:
            raise NotSupported("no sinks and no log-sum-exp here")
        return super().attend(kv, layer, q, k, v, plan)


class FlashRuntime(ZooRuntime):
    ATTENTION = FlashKernel


class SplitRuntime(BucketRuntime):
    ATTENTION = SplitKernel


class WholeRowRuntime(GraphRuntime):
    ATTENTION = WholeRowKernel
    OPS = BlockedOps


class CoarseRuntime(ZooRuntime):
    ATTENTION = CoarseKernel
    CAPS = replace(ZooRuntime.CAPS, numeric_class="B")


class ModestRuntime(ZooRuntime):
    """Declares little, and says so."""

    ATTENTION = ModestKernel
    CAPS = replace(
        ZooRuntime.CAPS,
        dtypes=frozenset({"float32"}),
        softcap=False,
        windows=False,
        sinks=False,
        return_lse=False,
    )


class AllDtypesRuntime(ZooRuntime):
    """With float64, where it is batch invariant by rounding."""

    CAPS = replace(ZooRuntime.CAPS, dtypes=ZooRuntime.CAPS.dtypes | {"float64"})


def reference(config: OpenConfig) -> Runtime:
    from vllm_core.bindings.numpy import open_runtime

    return open_runtime(config)


HONEST: dict[str, Open] = {
    "honest_flash": FlashRuntime,
    "honest_split": SplitRuntime,
    "honest_whole_row": WholeRowRuntime,
    "honest_plain": AllDtypesRuntime,
    "honest_coarse": CoarseRuntime,
    "honest_modest": ModestRuntime,
    "honest_codes": TileRuntime,
    "honest_codes_apart": ApartRuntime,
    "honest_int8_cache": Int8Runtime,
    "honest_int8_inverse": InverseRuntime,
    "honest_reference": reference,
    "honest_torch": torch_open,
    "honest_jax": jax_open,
    **LIMITED,
}
"""By the name under which `zoo.open` finds them."""


def dtypes_of(name: str) -> tuple[str, ...]:
    """Dtypes in which the honest zoo is judged."""
    if name in LIMITED_DTYPES:
        return LIMITED_DTYPES[name]
    if name == "honest_reference":
        return ("float32", "float64")
    if name == "honest_modest":
        return ("float32",)
    return ("float32", "bfloat16", "float16")
