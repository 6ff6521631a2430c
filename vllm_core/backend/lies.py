"""Tells what an opened runtime declares and does not have: a capability lie is named before it is
met in a step.

Knows: which methods a declared bit needs, which bits are reserved. Does not know: whether the
methods are right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from vllm_core.backend.attention import AttentionBackend
from vllm_core.backend.capabilities import Capabilities
from vllm_core.backend.communicator import Communicator
from vllm_core.backend.interface import SEAM_VERSION, Runtime
from vllm_core.ops import BlockTables, Ops

PARTS: dict[str, type] = {
    "caps": Capabilities,
    "ops": Ops,
    "attention": AttentionBackend,
    "block_tables": BlockTables,
    "comm": Communicator,
    "dtype": str,
}
"""Attributes of a runtime and what they must be."""

OVERRIDES: dict[str, tuple[tuple[str, str], ...]] = {
    "static_shapes": (("runtime", "buckets"), ("runtime", "num_compilations")),
    "exact_host_lengths": (("attention", "plan_host"),),
}
"""Bit -> (part, method) that must be the backend's own: the seam's default serves those without the
bit."""

ARGUMENTS: dict[str, tuple[str, str, str]] = {
    "sinks": ("attention", "attend", "sinks"),
    "return_lse": ("attention", "attend", "return_lse"),
}
"""Bit -> (part, method, argument that it must take)."""

RESERVED = (
    "tier",
    "max_drafts",
    "compact_tables",
    "q_pos",
    "tree",
    "bidirectional",
    "shard",
)
"""Bits that this version of the seam knows by name only: it has no method for them yet."""
KV_DTYPES = frozenset({"int8"})
"""KV formats beside the model dtype of which this version of the seam knows what they hold."""


def missing_methods(runtime: Runtime) -> list[str]:
    """One sentence for each thing that is declared or required and not there; empty when all is
    well."""
    found = list(_parts(runtime))
    if found:
        return found  # the rest would only repeat it
    owners = {"runtime": runtime, **{name: getattr(runtime, name) for name in PARTS}}
    for name, owner in owners.items():
        methods = sorted(getattr(type(owner), "__abstractmethods__", ()))
        found += [f"{name}: {type(owner).__name__} lacks the method {m}" for m in methods]
    return found + list(_bits(runtime.caps, owners))


def _parts(runtime: Runtime) -> Iterator[str]:
    for name, kind in PARTS.items():
        part = getattr(runtime, name, None)
        if not isinstance(part, kind):
            given = "nothing" if part is None else type(part).__name__
            yield f"its runtime's {name} must be a {kind.__name__}, but is {given}"


def _bits(caps: Capabilities, owners: dict[str, Any]) -> Iterator[str]:
    for bit, methods in OVERRIDES.items():
        for part, method in methods if getattr(caps, bit) else ():
            base = Runtime if part == "runtime" else PARTS[part]
            if getattr(type(owners[part]), method) is getattr(base, method):
                yield f"it declares {bit} without its own {part}.{method}"
    for bit, (part, method, argument) in ARGUMENTS.items():
        if getattr(caps, bit) and not _takes(getattr(owners[part], method), argument):
            yield f"it declares {bit}, but {part}.{method} takes no argument {argument!r}"
    usual = Capabilities(dtypes=frozenset(), default_dtype="")
    for field in fields(caps):
        value, default = getattr(caps, field.name), getattr(usual, field.name)
        if field.name in RESERVED and value != default:
            version = ".".join(map(str, SEAM_VERSION))
            yield (
                f"it declares {field.name}={value!r}, which seam {version} reserves "
                f"and has no method for; leave it at {default!r}"
            )
    unknown = caps.kv_dtypes - KV_DTYPES
    if unknown:
        yield (
            f"it declares kv_dtypes={', '.join(sorted(unknown))}, which this seam reserves; "
            f"declare none but {', '.join(sorted(KV_DTYPES))}"
        )
    more = caps.native_schemes - caps.schemes
    if more:
        yield f"its native_schemes {', '.join(sorted(more))} are not among its schemes"
    if caps.default_dtype not in caps.dtypes:
        yield f"its default_dtype {caps.default_dtype!r} is not among its dtypes"


def _takes(method: Any, argument: str) -> bool:
    parameters = inspect.signature(method).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
