"""Reads the parts of a dense weight, which every binding then joins in its own way.

Knows: what parts may be. Does not know: frameworks, layouts.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_core.errors import NotSupported, WeightError
from vllm_core.ops import HostArray, LazyArray, ParamSpec, Part


def dense_tensors(spec: ParamSpec, parts: Sequence[Part]) -> dict[str, list[HostArray]]:
    """By name, a tensor of each part in order. NotSupported (scheme), WeightError (a part lacks
    what the others have)."""
    found: dict[str, list[HostArray]] = {}
    for part in parts:
        if part.scheme != "dense":
            raise NotSupported(
                f"{spec.name}: weight scheme {part.scheme!r} is not supported here; "
                "load the weights dequantised"
            )
        for name, tensor in part.tensors.items():
            array = tensor.load() if isinstance(tensor, LazyArray) else tensor
            found.setdefault(name, []).append(array)
    for name, tensors in found.items():
        if len(tensors) != len(parts):
            raise WeightError(f"{spec.name}: {len(tensors)} of {len(parts)} parts have a {name}")
    return found
