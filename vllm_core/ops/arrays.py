"""Values that cross between the core and a framework.

Knows: what a parameter is made of. Does not know: any framework's array type.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from vllm_core.errors import WeightError

Array: TypeAlias = Any
"""numpy.ndarray, torch.Tensor or jax.Array: opaque to the core."""

HostArray: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class LazyArray:
    """A host array that is read from its file only when it is needed."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], HostArray]


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter along its output axis, in one scheme.

    tensors: the scheme's own names, for "dense" {"weight": [rows, in]}, for the schemes of
    `ops.quantized` {"codes", "scales"} and perhaps {"mins"}; and perhaps {"bias": [rows]}, in
    floats.
    """

    scheme: str
    tensors: Mapping[str, HostArray | LazyArray]
    rows: int


@dataclass(frozen=True)
class ParamSpec:
    """What the model needs at one place: a name, its logical shape, and how it may be cut.

    role: linear | embedding | norm | experts | table. A shard boundary is a multiple of `granule`.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    axes: tuple[str | None, ...] = ()
    granule: int = 1
    scheme: str = "dense"
    """What becomes of rows that come dense: a scheme of `ops.quantized` quantises them by its law,
    in groups of `group`."""
    group: int | None = None
    """Inputs that then share a scale; None: `group_for` tells."""

    def check(self, shape: Sequence[int]) -> None:
        """WeightError where a weight of this shape is not what the model needs."""
        if tuple(shape) != tuple(self.shape):
            raise WeightError(
                f"{self.name} needs shape {list(self.shape)}, but the weights have {list(shape)}"
            )


@dataclass(frozen=True)
class Param:
    """Arrays on the device in a layout that the backend chose, and static facts. A pytree node.

    For the scheme "dense": weight [out, in] (embedding [V, H], norm [H], experts [E, out, in]),
    bias [out].
    """

    arrays: dict[str, Array]
    static: Hashable = field(default="dense")

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def get(self, name: str) -> Array | None:
        return self.arrays.get(name)
