"""How a model's parameters follow from checkpoint tensors, as data.

Knows: names, shapes, transforms. Does not know: files, devices, families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_core.ops import ParamSpec, quantized

Rules = dict[str, Any]
"""Nested dicts of WeightRule; "layers" holds a list with one such dict per layer."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a part, made of one checkpoint tensor or, for experts, of several."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each tensor as it lies in the checkpoint."""
    transpose: bool = False
    """The checkpoint keeps [in, out]."""
    add: float = 0.0
    """Added in float32: norms that the checkpoint keeps as a distance from 1."""
    experts: int | None = None
    """How many: names holds, expert by expert, tensors to join along their rows, then to stack."""

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """As the model needs it."""
        if self.transpose:
            return self.shape[::-1]
        if self.experts is None:
            return self.shape
        joined = len(self.names) // self.experts
        return (self.experts, joined * self.shape[0], *self.shape[1:])


@dataclass(frozen=True)
class PartRule:
    """Some rows of a parameter along its output axis: "weight" and perhaps "bias"."""

    tensors: Mapping[str, TensorRule]
    rows: int


@dataclass(frozen=True)
class WeightRule:
    """One parameter: what the model needs, and the parts that make it up."""

    spec: ParamSpec
    parts: tuple[PartRule, ...]
    stays_dense: bool = False
    """Never quantised: small, and a small error in it changes much."""

    @property
    def may_be_codes(self) -> bool:
        """Whether it may be stored as codes: a matrix that inputs are multiplied with or looked up
        in. Experts are kept dense for now."""
        return not self.stays_dense and self.spec.role in ("linear", "embedding")


@dataclass(frozen=True)
class WeightRules:
    """All parameters of a model, and what its checkpoints may hold beside them."""

    params: Rules
    """A rule that stands in several places is loaded once, and its Param shared."""
    ignored: tuple[str, ...] = ()
    """Patterns (re.fullmatch) of tensors that are no weights, such as buffers and tied copies."""
    prefix: str = ""
    """Start of names that a checkpoint of the bare model leaves out."""

    def leaves(self) -> Iterator[WeightRule]:
        """Every rule once."""
        seen: set[int] = set()
        for rule in _leaves(self.params):
            if id(rule) not in seen:
                seen.add(id(rule))
                yield rule

    def num_values(self) -> int:
        """Numbers in all parameters."""
        return sum(
            math.prod(tensor.loaded_shape)
            for rule in self.leaves()
            for part in rule.parts
            for tensor in part.tensors.values()
        )

    def stored_as(self, quantization: str) -> WeightRules:
        """The same, with what comes dense quantised: linear layers as the name says (see
        `split_name`), embedding and head to 8 bits. What no group divides stays dense."""
        scheme, largest = split_name(quantization)
        head, wide = self.params.get("head"), scheme.replace("int4", "int8")
        done: dict[int, WeightRule] = {}

        def stored(rule: WeightRule) -> WeightRule:
            wanted = wide if rule is head or rule.spec.role == "embedding" else scheme
            if wanted == "dense" or not rule.may_be_codes:
                return rule
            own = largest if wanted == scheme else None
            group = quantized.group_for(quantized.BITS[wanted], rule.spec.shape[-1], own)
            if group is None:
                return rule
            return replace(rule, spec=replace(rule.spec, scheme=wanted, group=group))

        def walk(node: Any) -> Any:
            if isinstance(node, WeightRule):
                return done.setdefault(id(node), stored(node))
            if isinstance(node, dict):
                return {name: walk(child) for name, child in node.items()}
            return [walk(child) for child in node]

        return replace(self, params=walk(self.params))


def split_name(quantization: str) -> tuple[str, int | None]:
    """What users ask for -> the scheme, and the largest group or None: "int4-g32-weight-only" is
    ("int4-weight-only", 32)."""
    group = re.search(r"-g(\d+)", quantization)
    if group is None:
        return quantization, None
    return quantization.replace(group[0], ""), int(group[1])


def join_name(scheme: str, group: int) -> str:
    """The other way; 8 bits are named without a group."""
    return scheme.replace("int4", f"int4-g{group}")


def _leaves(tree: Any) -> Iterator[WeightRule]:
    if isinstance(tree, WeightRule):
        yield tree
        return
    for child in tree.values() if isinstance(tree, dict) else tree:
        yield from _leaves(child)


def linear(
    name: str, *sources: tuple[str, int], size: int, bias: bool, stays_dense: bool = False
) -> WeightRule:
    """[sum of rows, size] of modules (name, rows), fused along the output axis."""
    parts = tuple(_linear_part(source, rows, size, bias, False) for source, rows in sources)
    spec = ParamSpec(name, (sum(p.rows for p in parts), size), "linear")
    return WeightRule(spec, parts, stays_dense)


def transposed_linear(name: str, source: str, rows: int, size: int) -> WeightRule:
    """[rows, size] of a module that keeps [size, rows], with a bias."""
    part = _linear_part(source, rows, size, True, True)
    return WeightRule(ParamSpec(name, (rows, size), "linear"), (part,))


def _linear_part(source: str, rows: int, size: int, bias: bool, transpose: bool) -> PartRule:
    shape = (size, rows) if transpose else (rows, size)
    tensors = {"weight": TensorRule((f"{source}.weight",), shape, transpose=transpose)}
    if bias:
        tensors["bias"] = TensorRule((f"{source}.bias",), (rows,))
    return PartRule(tensors, rows)


def embedding(
    name: str, source: str, rows: int, size: int, *, stays_dense: bool = False
) -> WeightRule:
    """[rows, size] of one tensor."""
    part = PartRule({"weight": TensorRule((f"{source}.weight",), (rows, size))}, rows)
    return WeightRule(ParamSpec(name, (rows, size), "embedding"), (part,), stays_dense)


def norm(name: str, source: str, size: int, *, add: float = 0.0, bias: bool = False) -> WeightRule:
    """[size], plus `add`."""
    tensors = {"weight": TensorRule((f"{source}.weight",), (size,), add=add)}
    if bias:
        tensors["bias"] = TensorRule((f"{source}.bias",), (size,))
    return WeightRule(ParamSpec(name, (size,), "norm"), (PartRule(tensors, size),))


def experts(
    name: str, source: str, modules: tuple[str, ...], num_experts: int, rows: int, size: int
) -> WeightRule:
    """[num_experts, modules * rows, size]; `source` holds {expert} for the expert's number."""
    names = tuple(
        f"{source.format(expert=expert)}.{module}.weight"
        for expert in range(num_experts)
        for module in modules
    )
    total = len(modules) * rows
    part = PartRule({"weight": TensorRule(names, (rows, size), experts=num_experts)}, total)
    return WeightRule(ParamSpec(name, (num_experts, total, size), "experts"), (part,))
