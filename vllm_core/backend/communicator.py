"""Collectives between the devices of a group, by mesh axis.

Model code sees local shapes and names axes, so the same line serves a process per device and one
program over many. A size-1 axis is free; larger ones are reserved until a backend brings them. A
group's collectives are called by all its devices in the same order with the same shape and dtype,
leave their argument as it is, and take axes of length 0.

Knows: axis names. Does not know: transports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from vllm_core.errors import NotSupported
from vllm_core.ops import Array

AXES = ("dp", "pp", "tp", "ep", "cp")


class Group(ABC):
    """The devices along one axis."""

    size: int

    @abstractmethod
    def index(self) -> Array | int:
        """This device's place, a device value."""

    @abstractmethod
    def all_reduce(self, x: Array) -> Array:
        """The sum over the devices, the same bits on each."""

    @abstractmethod
    def all_gather(self, x: Array, axis: int) -> Array:
        """Every device's x, joined along the axis in the order of `index`."""

    @abstractmethod
    def reduce_scatter(self, x: Array, axis: int) -> Array:
        """Part `index` of the sum, cut along the axis into `size` equal parts."""

    @abstractmethod
    def all_to_all(self, x: Array, axis: int) -> Array:
        """x cut along the axis into `size` equal parts, part i for device i; what came, joined in
        the order of the senders. InvalidArgument when the parts would not be equal."""


class Communicator(ABC):
    """Groups by axis name."""

    @abstractmethod
    def axis(self, name: str) -> Group: ...


class Alone(Group):
    """A group of one: every collective is the identity."""

    size = 1

    def index(self) -> int:
        return 0

    def all_reduce(self, x: Array) -> Array:
        return x

    def all_gather(self, x: Array, axis: int) -> Array:
        return x

    def reduce_scatter(self, x: Array, axis: int) -> Array:
        return x

    def all_to_all(self, x: Array, axis: int) -> Array:
        return x


class SingleDevice(Communicator):
    """One device: every axis has size 1."""

    def axis(self, name: str) -> Group:
        if name not in AXES:
            raise NotSupported(f"there is no mesh axis {name!r}; known are {', '.join(AXES)}")
        return Alone()
