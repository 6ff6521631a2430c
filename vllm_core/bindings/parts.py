"""Reads the parts of a weight: as they are to be stored, or all dense for a binding that multiplies
nothing but numbers.

Knows: what parts may be. Does not know: frameworks, layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vllm_core.errors import InvalidArgument, NotSupported, WeightError
from vllm_core.ops import HostArray, LazyArray, ParamSpec, Part, quantized

SCHEMES = frozenset({"dense", *quantized.BITS})
"""What is read here."""

Quantizer = Callable[[HostArray, int, int], dict[str, HostArray]]
"""As quantized.quantize: a backend may have a faster one. The group that it gets is checked."""


class StoredPart(NamedTuple):
    """A part that was read and checked, in the scheme in which it is to be stored."""

    scheme: str
    tensors: dict[str, HostArray]
    """As in `Part`."""
    rows: int


def dense_tensors(spec: ParamSpec, parts: Sequence[Part]) -> dict[str, list[HostArray]]:
    """By name, a tensor of each part in order: codes dequantised, and dense rows as they are after
    quantising, where the spec asks for that. NotSupported (scheme), InvalidArgument (the spec's
    group), WeightError (a part lacks what the others have, or is wrong in itself)."""
    found: dict[str, list[HostArray]] = {}
    for part in stored_parts(spec, parts):
        tensors = dict(part.tensors)
        if part.scheme != "dense":
            tensors["weight"] = quantized.dequantize(tensors, quantized.BITS[part.scheme])
            tensors = {name: tensors[name] for name in ("weight", "bias") if name in tensors}
        for name, array in tensors.items():
            found.setdefault(name, []).append(array)
    for name, arrays in found.items():
        if len(arrays) != len(parts):
            raise WeightError(f"{spec.name}: {len(arrays)} of {len(parts)} parts have a {name}")
    return found


def stored_parts(
    spec: ParamSpec, parts: Sequence[Part], quantize: Quantizer = quantized.quantize
) -> Iterator[StoredPart]:
    """The parts as they are to be stored: dense, or codes. One at a time, so that a fused weight
    needs memory for one of its parts. Raises as `dense_tensors` does."""
    for scheme in (spec.scheme, *(part.scheme for part in parts)):
        if scheme not in SCHEMES:
            raise NotSupported(
                f"{spec.name}: weight scheme {scheme!r} is not supported here, only "
                f"{', '.join(sorted(SCHEMES))}; load the weights dequantised"
            )
    for part in parts:
        tensors = {
            name: x.load() if isinstance(x, LazyArray) else x for name, x in part.tensors.items()
        }
        scheme = part.scheme
        try:
            if scheme != "dense":
                quantized.check(tensors, scheme, part.rows, spec.shape[-1])
            elif spec.scheme != "dense":
                scheme = spec.scheme
                tensors = _quantized(spec, tensors, quantize)
        except WeightError as error:
            raise WeightError(f"{spec.name}: {error}") from None
        yield StoredPart(scheme, tensors, part.rows)


def _quantized(
    spec: ParamSpec, tensors: dict[str, HostArray], quantize: Quantizer
) -> dict[str, HostArray]:
    weight, bits = tensors.pop("weight"), quantized.BITS[spec.scheme]
    group = spec.group or quantized.group_for(bits, weight.shape[-1])
    if weight.ndim != 2 or group is None:
        raise NotSupported(
            f"{spec.name} {list(weight.shape)} cannot be stored as {spec.scheme}: its inputs must "
            "be a multiple of 32; load it dense"
        )
    try:
        quantized.check_group(weight.shape[-1], group)
    except InvalidArgument as error:
        raise InvalidArgument(f"{spec.name}: {error}") from None
    return tensors | quantize(weight, bits, group)
