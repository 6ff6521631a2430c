"""What a backend tells of itself: sizes, buckets, limits, signatures, reserved things.

Knows: our runtimes. Does not know: cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_core.backend import (
    BucketPolicy,
    Executable,
    KVGroup,
    OpenConfig,
    Program,
    Runtime,
    SingleDevice,
    StepConstraints,
)
from vllm_core.bindings.numpy import NumpyOps
from vllm_core.ops import Array, Features, Param, Part
from vllm_core_conformance.zoo.kernel import Kernel
from vllm_core_conformance.zoo.runtime import BucketRuntime, Collection, ZooRuntime, torch_open

collection = Collection("contract")
runtime = collection.runtime
kernel = collection.kernel
LIE = frozenset({"capability_lie", "fail"})


# ---------------------------------------------------------------- facts of the attention
@kernel("no block size is offered", expected=LIE)
class OffersNoBlockSize(Kernel):
    def block_tokens(self, spec: Any) -> tuple[int, ...]:
        return ()


@kernel("a block size of 0 is offered beside real ones", expected=LIE)
class OffersBlockSizeZero(Kernel):
    def block_tokens(self, spec: Any) -> tuple[int, ...]:
        return (*super().block_tokens(spec), 0)


@kernel("a block size is offered twice", expected=LIE)
class OffersBlockSizeTwice(Kernel):
    def block_tokens(self, spec: Any) -> tuple[int, ...]:
        sizes = super().block_tokens(spec)
        return (*sizes, sizes[0])


@kernel("block_bytes is of one token, whatever the block size")
class BytesOfOneToken(Kernel):
    def block_bytes(self, group: KVGroup) -> int:
        return super().block_bytes(group) // group.block_tokens


# ---------------------------------------------------------------- buckets and limits
@runtime("buckets have no place for log-probabilities", expected=LIE)
class BucketsLackLogprobs(BucketRuntime):
    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        policy = super().buckets(max_tokens, max_rows, max_width)
        return replace(policy, features=(Features(),))


@runtime("buckets of rows end one below the largest that was announced", expected=LIE)
class BucketsOneRowShort(BucketRuntime):
    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        policy = super().buckets(max_tokens, max_rows, max_width)
        return replace(policy, rows=tuple(max(1, rows - 1) for rows in policy.rows))


_count = itertools.count(1)


@runtime("buckets are other ones each time they are asked for", expected=LIE)
class BucketsChange(BucketRuntime):
    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        policy = super().buckets(max_tokens, max_rows, max_width)
        return replace(policy, tokens=(*policy.tokens, max_tokens + next(_count)))


@runtime("chunks must be multiples of 0", expected=LIE)
class ChunksOfZero(ZooRuntime):
    def constraints(self) -> StepConstraints:
        return StepConstraints(chunk_multiple=0)


# ---------------------------------------------------------------- methods
@runtime("compile takes no key: the method is of an older seam", expected=LIE)
class CompileTakesNoKey(ZooRuntime):
    def compile(self, program: Program) -> Executable:  # type: ignore[override]
        return super().compile(program, None)


@kernel("copy_blocks takes pairs instead of two lists", expected=LIE)
class CopyTakesPairs(Kernel):
    def copy_blocks(self, kv: Any, group: KVGroup, pairs: Array) -> Any:  # type: ignore[override]
        return super().copy_blocks(kv, group, pairs[:, 0], pairs[:, 1])


# ---------------------------------------------------------------- what is reserved
@runtime("update of a weight seems to work and keeps the old one")
class UpdateKeepsOld(ZooRuntime):
    def update(self, param: Param, parts: Sequence[Part]) -> Param:
        return param


@runtime("transfer seems to work and gives zeros")
class TransferGivesZeros(ZooRuntime):
    def transfer(self, value: Any, stage: int) -> Any:
        return np.zeros_like(value)


# ---------------------------------------------------------------- vocabulary, axes
@runtime("any name is an axis of the mesh")
class AnyAxis(ZooRuntime):
    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.comm = _AnyAxis()


class _AnyAxis(SingleDevice):
    def axis(self, name: str) -> Any:
        return super().axis("tp")


class _HalvesUp:
    """numpy, but for one word."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def round(x: Array) -> Array:
        return np.floor(x + np.asarray(0.5, x.dtype))


@runtime("round of the array vocabulary rounds halves up")
class RoundsHalvesUp(ZooRuntime):
    class OPS(NumpyOps):
        xp: Any = _HalvesUp()


@collection.open("over torch: what is declared is edited after opening", expected=LIE)
def torch_edits_capabilities(config: OpenConfig) -> Runtime:
    opened: Runtime = torch_open(config)
    right = opened.load

    def load(*args: Any) -> Param:
        opened.caps = replace(opened.caps, max_logit_rows=8)
        return right(*args)

    vars(opened)["load"] = load
    return opened


FAULTS = tuple(collection.faults)
