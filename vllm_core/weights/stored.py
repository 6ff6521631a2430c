"""Which parameters stay the codes that a checkpoint holds, the bytes that all of them take, and how
both are told.

Knows: rules, formats of codes. Does not know: files, devices, layouts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from vllm_core.weights.rules import PartRule, WeightRule, WeightRules, join_name
from vllm_core.weights.source import CodeFormat, WeightSource

Kept = Mapping[str, tuple[CodeFormat, ...]]
"""Name of a parameter -> the formats of its parts, for those that stay codes."""


def kept_codes(
    rules: WeightRules, source: WeightSource, schemes: Collection[str], *, weight_only: bool
) -> Kept:
    """Parameters all of whose parts the checkpoint holds in codes of these schemes; the others are
    dequantised when they are read. One that is to be quantised anew is not kept.

    weight_only: their inputs are not quantised, so that nothing is lost but what the file lost.
    """
    there = set(source.names())
    found: dict[str, tuple[CodeFormat, ...]] = {}
    for rule in rules.leaves() if schemes else ():
        if rule.may_be_codes and rule.spec.scheme == "dense":
            formats = [_format_of(part, rules.prefix, there, source) for part in rule.parts]
            if weight_only:
                formats = [f and replace(f, scheme=f"{f.scheme}-weight-only") for f in formats]
            usable = tuple(f for f in formats if f is not None and f.scheme in schemes)
            if len(usable) == len(formats):
                found[rule.spec.name] = usable
    return found


def _format_of(
    part: PartRule, prefix: str, there: Collection[str], source: WeightSource
) -> CodeFormat | None:
    tensor = part.tensors["weight"]
    if len(tensor.names) != 1 or tensor.transpose or tensor.add:
        return None
    name = actual_name(tensor.names[0], prefix, there)
    return None if name is None else source.codes(name)


def actual_name(name: str, prefix: str, there: Collection[str]) -> str | None:
    """As the checkpoint spells it, which may leave out the prefix; None where it lacks it."""
    if name in there:
        return name
    bare = name.removeprefix(prefix)
    return bare if bare in there else None


def param_bytes(rules: WeightRules, kept: Kept, native: Collection[str], itemsize: int) -> int:
    """Bytes of all parameters on the device. native: schemes whose codes stay codes there; what is
    quantised otherwise is stored in the model dtype of `itemsize` bytes."""
    return sum(
        _bytes_of(rule, kept.get(rule.spec.name), native, itemsize) for rule in rules.leaves()
    )


def _bytes_of(
    rule: WeightRule, kept: tuple[CodeFormat, ...] | None, native: Collection[str], itemsize: int
) -> int:
    total = 0
    for place, part in enumerate(rule.parts):
        form = _stored_form(rule, kept, place)
        for name, tensor in part.tensors.items():
            if name == "weight" and form is not None and form.scheme in native:
                total += form.num_bytes(part.rows, rule.spec.shape[-1])
            else:
                total += math.prod(tensor.loaded_shape) * itemsize
    return total


def _stored_form(
    rule: WeightRule, kept: tuple[CodeFormat, ...] | None, place: int
) -> CodeFormat | None:
    """Of the weight of a part; None: dense."""
    if kept is not None:
        return kept[place]
    if rule.spec.scheme == "dense":
        return None
    return CodeFormat(rule.spec.scheme, rule.spec.group or rule.spec.shape[-1])


def scheme_names(rules: WeightRules, kept: Kept, native: Collection[str], dtype: str) -> str:
    """How matrices are stored, in words, the most values first: "int4-g64 + int8", or
    "int4-g32 as in the file + dense". What is small and always dense is not told."""
    sizes: Counter[str] = Counter()
    is_native = True
    for rule in rules.leaves():
        if rule.stays_dense or rule.spec.role not in ("linear", "embedding", "experts"):
            continue
        for place, part in enumerate(rule.parts):
            form = _stored_form(rule, kept.get(rule.spec.name), place)
            name = "dense" if form is None else join_name(form.scheme, form.group)
            sizes[name] += math.prod(part.tensors["weight"].loaded_shape)
            is_native = is_native and (form is None or form.scheme in native)
    names = [name for name, _ in sizes.most_common()]
    if kept:  # what is not kept is dense, perhaps from codes of the file
        rest = ["dense"] if "dense" in names else []
        codes = " + ".join(name for name in names if name != "dense")
        return " + ".join([f"{codes} as in the file", *rest])
    told = " + ".join(names)
    return told if is_native else f"{told} as {dtype} numbers"
