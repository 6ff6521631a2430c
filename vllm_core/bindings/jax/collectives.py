"""Collectives inside `jax.shard_map`: one program over many devices.

The compiler knows every device of the mesh, so a dead one fails the whole program; there is no
peer to wait for.

Knows: names of mesh axes. Does not know: models, how the mesh came to be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from vllm_core.backend.communicator import AXES, Alone, Communicator, Group
from vllm_core.errors import InvalidArgument, NotSupported


class JaxGroup(Group):
    """The devices along one mesh axis, or along several taken as one; only inside shard_map."""

    def __init__(self, names: tuple[str, ...], size: int) -> None:
        self.names, self.size = names, size

    def index(self) -> jax.Array:
        return lax.axis_index(self.names)

    def all_reduce(self, x: jax.Array) -> jax.Array:
        found: jax.Array = lax.psum(x, self.names)  # type: ignore[no-untyped-call]
        return found

    def all_gather(self, x: jax.Array, axis: int) -> jax.Array:
        axis = _place(x, axis)
        if not x.size:  # XLA gathers no empty axis
            return jnp.concatenate([x] * self.size, axis)
        found: jax.Array = lax.all_gather(x, self.names, axis=axis, tiled=True)
        return found

    def reduce_scatter(self, x: jax.Array, axis: int) -> jax.Array:
        axis = self._splits(x, axis)
        if not x.size:
            return lax.slice_in_dim(x, 0, x.shape[axis] // self.size, axis=axis)
        found: jax.Array = lax.psum_scatter(  # type: ignore[no-untyped-call]
            x, self.names, scatter_dimension=axis, tiled=True
        )
        return found

    def all_to_all(self, x: jax.Array, axis: int) -> jax.Array:
        axis = self._splits(x, axis)
        if not x.size:
            return x
        found: jax.Array = lax.all_to_all(  # type: ignore[no-untyped-call]
            x, self.names, split_axis=axis, concat_axis=axis, tiled=True
        )
        return found

    def _splits(self, x: jax.Array, axis: int) -> int:
        axis = _place(x, axis)
        if x.shape[axis] % self.size:
            raise InvalidArgument(
                f"an axis of {x.shape[axis]} does not split into {self.size} equal parts; pad it"
            )
        return axis


def _place(x: jax.Array, axis: int) -> int:
    return axis % x.ndim


class JaxCommunicator(Communicator):
    """Groups of a mesh whose axes are named as the seam names them.

    products: names for several mesh axes taken as one, such as {"ep": ("dp", "tp")}. Axes that the
    mesh does not have are of size 1.
    """

    def __init__(
        self, mesh: jax.sharding.Mesh, products: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        sizes = dict(mesh.shape)
        members = {name: (name,) for name in sizes} | {
            name: tuple(axes) for name, axes in (products or {}).items()
        }
        self._groups: dict[str, Group] = {}
        for name, axes in members.items():
            unknown = [axis for axis in (name, *axes) if axis not in AXES]
            missing = [axis for axis in axes if axis not in sizes]
            if unknown or missing:
                raise InvalidArgument(
                    f"axis {name!r}: {(unknown or missing)[0]!r} is no axis of the mesh {sizes}"
                )
            along = tuple(axis for axis in sizes if axis in axes)
            size = math.prod(sizes[axis] for axis in along)
            self._groups[name] = Alone() if size == 1 else JaxGroup(along, size)

    def axis(self, name: str) -> Group:
        if name not in AXES:
            raise NotSupported(f"there is no mesh axis {name!r}; known are {', '.join(AXES)}")
        return self._groups.get(name) or Alone()
