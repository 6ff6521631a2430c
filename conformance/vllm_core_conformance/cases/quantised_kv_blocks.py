"""Cases: blocks of 8 bits as data: exported, imported, copied with their scales, and counted.

Knows: codes, scales, bytes. Does not know: layouts, what attention makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from vllm_core.backend import KVFormat, KVGroup
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases import kv
from vllm_core_conformance.cases.attention_shapes import INT8, shape_of
from vllm_core_conformance.target import Target, calling


def _facts(target: Target, seed: int) -> Evidence:
    """Bytes of codes and scales, less than the model's dtype would have; a fingerprint that tells
    the formats apart."""
    attention, evidence = target.runtime.attention, Evidence()
    (group,) = shape_of(target, f"{INT8}decode").groups(target.dtype)
    plain = replace(group, spec=replace(group.spec, kv=KVFormat(target.dtype)))
    with calling("alloc"):
        attention.alloc((group,), {group.pool: 2})
    for layers, size in ((group.layers, group.block_tokens), (5, 1)):
        kinds = [replace(x, layers=layers) for x in (group, plain)]
        if size in target.block_tokens(group.spec):
            kinds = [replace(x, block_tokens=size) for x in kinds]
        with calling("block_bytes"):
            found, as_model = (int(attention.block_bytes(kind)) for kind in kinds)
        least = _least_bytes(kinds[0])
        require(
            found >= least,
            f"block_bytes of {layers} layers of {kinds[0].block_tokens} tokens is {found}, but "
            f"their codes and scales have {least} bytes",
        )
        require(
            found < as_model,
            f"block_bytes is {found} in 8 bits, and {as_model} in {target.dtype}: nothing is saved",
        )
        evidence.checks += 2
    with calling("layout_fingerprint"):
        own, other = (attention.layout_fingerprint(x) for x in (group, plain))
    require(
        own != other,
        f"layout_fingerprint is {own!r} for caches of 8 bits and of {target.dtype}: their raw "
        "bytes are not interchangeable",
    )
    evidence.checks += 1
    return evidence


def _least_bytes(group: KVGroup) -> int:
    spec = group.spec
    vectors = group.layers * group.block_tokens * spec.num_kv_heads
    return vectors * (spec.dim_qk + spec.dim_v + 2 * 4)


def _case(what: str, says: str, run: Callable[..., Evidence], **more: Any) -> Case:
    return Case(
        f"quantised.kv.{what}",
        says,
        partial(run, **more),
        frozenset({"quantised"}),
        needs=("kv:int8",),
        every_dtype=True,
    )


_SAME = {"prefix": INT8}

CASES: tuple[Case, ...] = (
    _case("round_trip", "exports the codes and scales that it imported", kv.round_trip, **_SAME),
    _case("import_few", "an import changes its own blocks and scales only", kv.import_few, **_SAME),
    _case("copy", "a copied block has the codes and scales of its source", kv.copy, **_SAME),
    _case("facts", "counts codes and scales, and names the format", _facts),
)
