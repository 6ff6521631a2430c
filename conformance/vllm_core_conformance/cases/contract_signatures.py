"""Case: every method of a runtime can be called as the seam calls it.

Knows: signatures. Does not know: what methods do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_core.backend import AttentionBackend, BlockTables, Communicator, Runtime
from vllm_core.backend.communicator import AXES, Group
from vllm_core.backend.lies import ARGUMENTS
from vllm_core.ops import Ops
from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.target import Target, calling

Parameter = inspect.Parameter


def signatures(target: Target, rng: np.random.Generator) -> Evidence:
    """Positional arguments by number and order, keywords by name; more must be optional."""
    runtime = target.runtime
    with calling("comm.axis"):
        group = runtime.comm.axis(AXES[0])
    parts: list[tuple[str, Any, type]] = [
        ("runtime", runtime, Runtime),
        ("ops", runtime.ops, Ops),
        ("attention", runtime.attention, AttentionBackend),
        ("block_tables", runtime.block_tables, BlockTables),
        ("comm", runtime.comm, Communicator),
        ("comm.axis(...)", group, Group),
    ]
    evidence = Evidence()
    for name, part, base in parts:
        for method, ours in _methods(base):
            theirs = getattr(part, method, None)
            if not callable(theirs):
                raise Failed(f"{name}.{method} is {theirs!r}: the seam calls it")
            try:
                signature = inspect.signature(theirs)
            except (TypeError, ValueError):
                continue  # compiled code does not tell
            optional = _optional(target, name, method)
            asked = [p for p in list(ours.parameters.values())[1:] if p.name not in optional]
            wrong = _difference(asked, signature)
            if wrong:
                raise Failed(
                    f"{name}.{method}{signature} cannot be called as the seam does: {wrong}"
                )
            renamed = _renamed(list(ours.parameters.values())[1:], signature)
            if renamed:
                evidence.notes.append(f"{name}.{method}: {renamed}")
            evidence.checks += 1
    return evidence


def _optional(target: Target, part: str, method: str) -> set[str]:
    """Arguments that belong to a bit which is not declared."""
    return {
        argument
        for bit, (owner, name, argument) in ARGUMENTS.items()
        if (owner, name) == (part, method) and not getattr(target.caps, bit)
    }


def _methods(base: type) -> Iterator[tuple[str, inspect.Signature]]:
    for name, member in inspect.getmembers(base, inspect.isfunction):
        if not name.startswith("_"):
            yield name, inspect.signature(member)


def _positional(parameters: list[Parameter]) -> list[Parameter]:
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _difference(ours: list[Parameter], theirs: inspect.Signature) -> str:
    """What hinders a call with positional arguments by order and keyword-only ones by name."""
    found = list(theirs.parameters.values())
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in found)
    takes_names = any(p.kind is p.VAR_KEYWORD for p in found)
    wanted, given = _positional(ours), _positional(found)
    if len(given) < len(wanted) and not takes_any:
        return f"it takes {len(given)} positional arguments, the seam passes {len(wanted)}"
    extra = [p.name for p in given[len(wanted) :] if p.default is p.empty]
    by_name = {p.name: p for p in found if p.kind is p.KEYWORD_ONLY}
    by_name |= {p.name: p for p in given[len(wanted) :]}
    for parameter in ours:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        own = by_name.get(parameter.name)
        if own is None and not takes_names:
            return f"it takes no {parameter.name!r}"
        if own is not None and own.default is own.empty and parameter.default is not own.empty:
            return f"{parameter.name!r} has no default, and callers may leave it out"
        extra = [name for name in extra if name != parameter.name]
    for parameter, own in zip(wanted, given, strict=False):
        if parameter.default is not parameter.empty and own.default is own.empty:
            return f"{own.name!r} has no default, and callers may leave it out"
    names = {p.name for p in ours}
    extra += [n for n, p in by_name.items() if p.default is p.empty and n not in names]
    return f"the seam passes no {extra[0]!r}" if extra else ""


def _renamed(ours: list[Parameter], theirs: inspect.Signature) -> str:
    """A hint only: positional arguments have other names than in the seam."""
    given = _positional(list(theirs.parameters.values()))
    pairs = [
        f"{own.name} for {parameter.name}"
        for parameter, own in zip(_positional(ours), given, strict=False)
        if own.name != parameter.name
    ]
    return f"other names than the seam's: {', '.join(pairs)}" if pairs else ""
