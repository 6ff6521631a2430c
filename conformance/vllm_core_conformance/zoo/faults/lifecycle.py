"""Opening, closing, two runtimes beside each other, errors of the wrong kind.

Knows: our runtimes. Does not know: cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from vllm_core.backend import (
    KV,
    Capabilities,
    Executable,
    KVGroup,
    OpenConfig,
    Program,
    Runtime,
)
from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, Param, ParamSpec, Part
from vllm_core_conformance.zoo.kernel import Kernel
from vllm_core_conformance.zoo.runtime import Collection, ZooRuntime, torch_open

collection = Collection("lifecycle")
runtime = collection.runtime
kernel = collection.kernel


@runtime("closing twice raises")
class CloseTwiceRaises(ZooRuntime):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True


@runtime("close raises while programs exist")
class CloseRaises(ZooRuntime):
    programs = 0

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        self.programs += 1
        return super().compile(program, key)

    def close(self) -> None:
        if self.programs:
            raise RuntimeError(f"{self.programs} programs are still alive")


class _Shared:
    """What all runtimes of the process share by mistake."""

    last: ZooRuntime | None = None
    caches: ClassVar[dict[Any, KV]] = {}
    closed = False


@runtime("closing one runtime closes all of the process")
class CloseClosesAll(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        _Shared.closed = False

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)

        def call(*args: Any) -> tuple[Any, ...]:
            if _Shared.closed:
                raise RuntimeError("the device was closed")
            return run(*args)

        return call

    def close(self) -> None:
        _Shared.closed = True


@kernel("two caches of equal shape are one: the second allocation returns the first")
class CachesAreOne(Kernel):
    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        key = (tuple(groups), tuple(sorted(num_blocks.items())), str(self.dtype))
        return _Shared.caches.setdefault(key, super().alloc(groups, num_blocks))


@runtime("a second runtime in the process takes the dtype of the first")
class DtypeOfFirstRuntime(ZooRuntime):
    first: str | None = None

    def chosen_dtype(self, config: OpenConfig) -> str:
        cls = type(self)
        cls.first = cls.first or super().chosen_dtype(config)
        return cls.first


@runtime("an unknown dtype is opened as float32 instead of being refused")
class UnknownDtypeAccepted(ZooRuntime):
    def chosen_dtype(self, config: OpenConfig) -> str:
        return config.dtype if config.dtype in self.caps.dtypes else "float32"


@runtime("an unknown dtype raises KeyError")
class UnknownDtypeRaisesKeyError(ZooRuntime):
    def chosen_dtype(self, config: OpenConfig) -> str:
        if config.dtype != "auto" and config.dtype not in self.caps.dtypes:
            raise KeyError(config.dtype)
        return super().chosen_dtype(config)


@runtime("dtype auto ignores what the checkpoint stores and takes bfloat16, which is not declared")
class AutoIsUndeclared(ZooRuntime):
    CAPS = replace(ZooRuntime.CAPS, dtypes=frozenset({"float32", "float16"}))

    def chosen_dtype(self, config: OpenConfig) -> str:
        return "bfloat16" if config.dtype == "auto" else super().chosen_dtype(config)


@kernel("log-sum-exp with sinks is computed instead of refused")
class LseWithSinksAccepted(Kernel):
    def attend(self, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        if more.get("sinks") is None or not more.get("return_lse"):
            return super().attend(kv, layer, q, k, v, plan, **more)
        out, _, kv = super().attend(kv, layer, q, k, v, plan, sinks=more["sinks"])
        return out, np.zeros(q.shape[:2], np.float32), kv


@kernel("log-sum-exp with sinks raises RuntimeError instead of InvalidArgument")
class LseWithSinksWrongError(Kernel):
    def attend(self, kv: Any, layer: Any, q: Any, k: Any, v: Any, plan: Any, **more: Any) -> Any:
        if more.get("sinks") is not None and more.get("return_lse"):
            raise RuntimeError("return_lse with sinks")
        return super().attend(kv, layer, q, k, v, plan, **more)


@runtime("an unknown weight scheme is loaded as if it were dense")
class UnknownSchemeAccepted(ZooRuntime):
    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        return super().load(spec, [replace(part, scheme="dense") for part in parts])


@runtime("an unknown weight scheme raises ValueError")
class UnknownSchemeRaisesValueError(ZooRuntime):
    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        try:
            return super().load(spec, parts)
        except NotSupported as error:
            raise ValueError(str(error)) from error


@runtime("capabilities change after the first program")
class CapabilitiesChange(ZooRuntime):
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        self.caps = replace(self.caps, softcap=False, windows=False)
        return super().compile(program, key)


@runtime("each look at the capabilities gives another answer", expected=frozenset({"fail"}))
class CapabilitiesFlicker(ZooRuntime):
    looks = 0

    def declared(self) -> Capabilities:
        type(self).looks += 1
        return replace(self.CAPS, return_lse=type(self).looks % 2 == 0)


@runtime("the runtime's dtype is no numpy name", expected=frozenset({"capability_lie", "fail"}))
class DtypeIsNoName(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.dtype = f"torch.{self.dtype}"


@collection.open("over torch: a second close raises, since the stream is gone")
def torch_close_twice_raises(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.close
    closed: list[bool] = []

    def close() -> None:
        if closed:
            raise RuntimeError("no stream")
        closed.append(True)
        right()

    vars(opened)["close"] = close
    return opened


FAULTS = tuple(collection.faults)
