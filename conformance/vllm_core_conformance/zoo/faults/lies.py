"""Capabilities that are not so, in both directions.

Knows: capabilities, our runtimes. Does not know: cases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.backend import AttentionSpec, OpenConfig, Runtime
from vllm_core.bindings.numpy import NumpyOps
from vllm_core.errors import NotSupported
from vllm_core.ops import Array, HostArray, Param
from vllm_core_conformance.zoo.faults.attention import WindowIgnored
from vllm_core_conformance.zoo.faults.numerics import (
    DotOf10Bits,
    LseInBase2,
    ScoresOf16Bits,
    SinkIgnored,
    SoftcapIgnored,
)
from vllm_core_conformance.zoo.kernel import Kernel, Sums, wide
from vllm_core_conformance.zoo.runtime import (
    BFLOAT16,
    BucketRuntime,
    Collection,
    ZooRuntime,
    jax_open,
    mapped,
    torch_open,
)

collection = Collection("lies")
runtime = collection.runtime

LIE = frozenset({"capability_lie", "fail"})
"""A contract case finds the bit, or a case that needs it finds the refusal."""
CAPS = ZooRuntime.CAPS


# ---------------------------------------------------------------- declared and refused
def _refuses(bit: str) -> type[Kernel]:
    """A kernel that has no softcap, windows, sinks or lse."""

    class Refusing(Kernel):
        def attend(
            self, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any
        ) -> Any:
            spec: AttentionSpec = plan.spec
            asked = {
                "softcap": spec.softcap is not None,
                "windows": spec.window is not None,
                "sinks": more.get("sinks") is not None,
                "return_lse": bool(more.get("return_lse")),
            }
            if asked[bit]:
                raise NotSupported(f"this kernel has no {bit}")
            return super().attend(kv, layer, q, k, v, plan, **more)

    return Refusing


@runtime("softcap is declared and refused", expected=LIE)
class DeclaresSoftcapRefuses(ZooRuntime):
    ATTENTION = _refuses("softcap")


@runtime("windows are declared and refused", expected=LIE)
class DeclaresWindowsRefuses(ZooRuntime):
    ATTENTION = _refuses("windows")


@runtime("sinks are declared and refused", expected=LIE)
class DeclaresSinksRefuses(ZooRuntime):
    ATTENTION = _refuses("sinks")


@runtime("return_lse is declared and refused", expected=LIE)
class DeclaresLseRefuses(ZooRuntime):
    ATTENTION = _refuses("return_lse")


@runtime("return_lse is declared, but nothing comes back", expected=LIE)
class DeclaresLseReturnsNone(ZooRuntime):
    class ATTENTION(Kernel):
        def attend(self, *args: Any, **more: Any) -> Any:
            out, _, kv = super().attend(*args, **more)
            return out, None, kv


@runtime("heads up to 256 are declared; those above 128 are refused", expected=LIE)
class DeclaresDim256Refuses(ZooRuntime):
    class ATTENTION(Kernel):
        def alloc(self, groups: Any, num_blocks: Any) -> Any:
            if any(group.spec.dim_qk > 128 for group in groups):
                raise NotSupported("heads are at most 128 wide")
            return super().alloc(groups, num_blocks)


@runtime("bfloat16 is declared and refused when it is opened", expected=LIE)
class DeclaresBfloat16Refuses(ZooRuntime):
    def chosen_dtype(self, config: OpenConfig) -> str:
        if config.dtype == "bfloat16":
            raise NotSupported("bfloat16 needs another device")
        return super().chosen_dtype(config)


@runtime("a group of query heads that is no power of two is refused", expected=LIE)
class RefusesOddGroups(ZooRuntime):
    class ATTENTION(Kernel):
        def plan(self, *args: Any) -> Any:
            if any(spec.queries_per_kv & (spec.queries_per_kv - 1) for spec in args[5]):
                raise NotSupported("the group must be a power of two")
            return super().plan(*args)


# ---------------------------------------------------------------- undeclared, accepted, wrong
@runtime("softcap is not declared, yet accepted and ignored", expected=LIE)
class UndeclaredSoftcapIgnored(ZooRuntime):
    CAPS = replace(CAPS, softcap=False)
    ATTENTION = SoftcapIgnored


@runtime("windows are not declared, yet accepted and ignored", expected=LIE)
class UndeclaredWindowIgnored(ZooRuntime):
    CAPS = replace(CAPS, windows=False)
    ATTENTION = WindowIgnored


@runtime("sinks are not declared, yet accepted and ignored", expected=LIE)
class UndeclaredSinksIgnored(ZooRuntime):
    CAPS = replace(CAPS, sinks=False)
    ATTENTION = SinkIgnored


@runtime("return_lse is not declared, yet something to base 2 comes back", expected=LIE)
class UndeclaredLseWrong(ZooRuntime):
    CAPS = replace(CAPS, return_lse=False)
    ATTENTION = LseInBase2


@runtime("heads above 128 are not declared, yet accepted and cut", expected=LIE)
class UndeclaredDimCut(ZooRuntime):
    CAPS = replace(CAPS, max_head_dim=128)

    class ATTENTION(Kernel):
        def dot(self, q: HostArray, keys: HostArray) -> HostArray:
            return super().dot(q[..., :128], keys[..., :128])


# ---------------------------------------------------------------- dtypes
@runtime("bfloat16 is declared; the arrays are float32", expected=LIE)
class Bfloat16IsFloat32(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.attention = Kernel("float32" if self.dtype == "bfloat16" else self.dtype)

    class OPS(NumpyOps):
        def cast(self, x: Array, dtype: str) -> Array:
            return super().cast(x, "float32" if dtype == "bfloat16" else dtype)


@runtime("float16 is computed as bfloat16", expected=LIE)
class Float16IsBfloat16(ZooRuntime):
    class ATTENTION(Kernel):
        def stored(self, x: HostArray) -> HostArray:
            return x.astype(BFLOAT16).astype(x.dtype) if x.dtype == np.float16 else x

        def rounded(self, out: HostArray, dtype: Any) -> HostArray:
            return out.astype(BFLOAT16).astype(dtype) if dtype == np.float16 else out.astype(dtype)


@runtime("float32 goes through bfloat16 matrix units", expected=LIE, worst=True)
class Float32Through16Bits(ZooRuntime):
    class OPS(NumpyOps):
        def linear(self, x: Array, param: Param) -> Array:
            return super().linear(x.astype(BFLOAT16), _halved(param)).astype(x.dtype)

        def logits(self, x: Array, param: Param) -> Array:
            return super().logits(x.astype(BFLOAT16), _halved(param)).astype(wide(x).dtype)

    ATTENTION = ScoresOf16Bits


@runtime("class A is declared; scores have 10 bits of mantissa", expected=LIE)
class ClassBCalledA(ZooRuntime):
    ATTENTION = DotOf10Bits


@runtime("class B is declared; values are good to 6 bits", expected=LIE)
class ClassCCalledB(ZooRuntime):
    CAPS = replace(CAPS, numeric_class="B", dtypes=frozenset({"float32"}))

    class ATTENTION(Kernel):
        def divided(self, sums: Sums) -> HostArray:
            out = super().divided(sums)
            return np.ldexp(np.round(np.frexp(out)[0] * 64) / 64, np.frexp(out)[1]).astype(
                out.dtype
            )


@runtime("the numeric class is a letter that does not exist", expected=LIE)
class NumericClassD(ZooRuntime):
    CAPS = replace(CAPS, numeric_class="D")


@runtime("the default dtype is not among those declared", expected=LIE)
class DefaultDtypeUndeclared(ZooRuntime):
    CAPS = replace(CAPS, default_dtype="float64")


@runtime("float64 is declared and computed in float32", expected=LIE)
class Float64IsFloat32(ZooRuntime):
    CAPS = replace(CAPS, dtypes=CAPS.dtypes | {"float64"})

    def chosen_dtype(self, config: OpenConfig) -> str:
        self.wanted = super().chosen_dtype(config)
        return "float32" if self.wanted == "float64" else self.wanted


# ---------------------------------------------------------------- other bits
@runtime("batch_invariant is declared; the number of splits follows the rows", expected=LIE)
class NotBatchInvariant(ZooRuntime):
    CAPS = replace(CAPS, batch_invariant=True)

    class ATTENTION(Kernel):
        num_rows = 1

        def plan(self, *args: Any) -> Any:
            self.num_rows = max(1, int((np.diff(args[2].query_start) > 0).sum()))
            return super().plan(*args)

        def splits(self, num_keys: int) -> list[range]:
            size = max(1, -(-num_keys // (1 + self.num_rows % 7)))
            return [range(i, min(num_keys, i + size)) for i in range(0, max(num_keys, 1), size)]


@runtime("batch_invariant is declared; a product of one row takes another route", expected=LIE)
class OneRowIsDifferent(ZooRuntime):
    CAPS = replace(CAPS, batch_invariant=True)

    class OPS(NumpyOps):
        def linear(self, x: Array, param: Param) -> Array:
            if len(x) > 1:
                return super().linear(x, param)
            a, b = wide(x)[:, ::-1], wide(param["weight"])[:, ::-1]
            out = (a[:, None, :] * b).cumsum(-1, dtype=a.dtype)[..., -1]
            return (out if param.get("bias") is None else out + wide(param["bias"])).astype(x.dtype)


@runtime("static shapes are declared without buckets", expected=LIE)
class StaticWithoutBuckets(ZooRuntime):
    CAPS = replace(CAPS, static_shapes=True)


@runtime("exact host lengths are asked for, and nothing is planned on the host", expected=LIE)
class ExactLengthsWithoutPlan(ZooRuntime):
    CAPS = replace(CAPS, exact_host_lengths=True)


@runtime("bits that the seam reserves are declared", expected=LIE)
class DeclaresReserved(ZooRuntime):
    CAPS = replace(CAPS, max_drafts=4, tree=True)


@runtime("a scheme is declared that load does not take", expected=LIE)
class DeclaresScheme(ZooRuntime):
    CAPS = replace(CAPS, schemes=frozenset({"dense", "fp8"}))


@runtime("a cache of 8 bits is declared, which nothing makes", expected=LIE)
class DeclaresKvFormat(ZooRuntime):
    CAPS = replace(CAPS, kv_dtypes=frozenset({"float8_e4m3fn"}))


@runtime("the dense scheme is not declared", expected=LIE)
class NoSchemes(ZooRuntime):
    CAPS = replace(CAPS, schemes=frozenset())


@runtime("eager shapes are declared; every new shape is compiled", expected=LIE)
class EagerButCompiles(BucketRuntime):
    CAPS = ZooRuntime.CAPS


@runtime("more logit rows than declared lose their logits", expected=LIE)
class LogitRowsOverrun(ZooRuntime):
    class OPS(NumpyOps):
        def logits(self, x: Array, param: Param) -> Array:
            out = super().logits(x, param)
            out[64:] = 0
            return out


@runtime("attend lacks the argument for sinks that the capability promises", expected=LIE)
class NoArgumentForSinks(ZooRuntime):
    class ATTENTION(Kernel):
        def attend(  # type: ignore[override]
            self,
            kv: Any,
            layer: Any,
            q: Any,
            k: Any,
            v: Any,
            plan: Any,
            *,
            return_lse: bool = False,
        ) -> Any:
            return super().attend(kv, layer, q, k, v, plan, return_lse=return_lse)


@collection.open("over torch: softcap is declared and dropped", expected=LIE)
def torch_drops_softcap(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.attention.plan

    def plan(state: Any, view: Any, step: Any, key: Any, part: Any, specs: Any, groups: Any) -> Any:
        specs = tuple(replace(spec, softcap=None) for spec in specs)
        return right(state, view, step, key, part, specs, groups)

    vars(opened.attention)["plan"] = plan
    return opened


@collection.open("over JAX: batch_invariant is declared, though products are not", expected=LIE)
def jax_declares_batch_invariant(config: OpenConfig) -> Runtime:
    opened: Runtime = jax_open(config)
    opened.caps = replace(opened.caps, batch_invariant=True)
    return opened


@collection.open("over torch: 16-bit models keep weights in float32", expected=LIE)
def torch_promotes_activations(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.ops.linear
    vars(opened.ops)["linear"] = lambda x, param: right(x, param).float()
    return opened


def _halved(param: Param) -> Param:
    return Param(mapped(lambda x: x.astype(BFLOAT16), param.arrays), param.static)


FAULTS = tuple(collection.faults)
