"""Collectives over torch.distributed: one process per device, any of its transports.

A peer that died or froze ends a collective with PeerLost within the declared time, never with a
hang: on the CPU the caller watches the clock itself; devices with queues leave that to the
transport's own watchdog, which gets the same time.

Knows: process groups, ranks of a mesh. Does not know: models, vendors, who starts the processes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vllm_core.backend.communicator import AXES, Alone, Communicator, Group
from vllm_core.errors import InvalidArgument, NotSupported, PeerLost

DEFAULT_TIMEOUT = 60.0
"""Seconds until a peer that does not answer counts as lost."""

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its newer name where torch has it."""
_SPIN = 0.001
"""Seconds for which a waiting thread only yields; most collectives of a step end within."""
_NAP = 0.0005


class TorchGroup(Group):
    """The processes along one axis; `ranks` in the order of the axis."""

    def __init__(self, ranks: Sequence[int], handle: dist.ProcessGroup, timeout: float) -> None:
        self.ranks, self.size = tuple(ranks), len(ranks)
        self._handle, self._timeout = handle, timeout
        self._index = self.ranks.index(dist.get_rank())

    def index(self) -> int:
        return self._index

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        if out.numel():
            self._run(
                "all_reduce",
                out,
                lambda: dist.all_reduce(out, group=self._handle, async_op=True),
            )
        return out

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        own = x.movedim(axis, 0).contiguous()
        out = own.new_empty((self.size * own.shape[0], *own.shape[1:]))
        if out.numel():
            self._run(
                "all_gather",
                own,
                lambda: _gather(out, own, group=self._handle, async_op=True),
            )
        return out.movedim(0, axis)

    def reduce_scatter(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Parts change places, then each device sums its own, 16 bits in float32: not every
        transport has a reduce-scatter, and those sum in 16 bits."""
        moved = self.all_to_all(x, axis).movedim(axis, 0)
        parts = moved.reshape(self.size, -1, *moved.shape[1:])
        is_short = x.dtype in (torch.bfloat16, torch.float16)
        total = parts.sum(0, dtype=torch.float32 if is_short else x.dtype)
        return total.to(x.dtype).movedim(0, axis)

    def all_to_all(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        own = x.movedim(axis, 0).contiguous()
        if own.shape[0] % self.size:
            raise InvalidArgument(
                f"an axis of {own.shape[0]} does not split into {self.size} equal parts; pad it"
            )
        out = torch.empty_like(own)
        if out.numel():
            self._run(
                "all_to_all",
                own,
                lambda: dist.all_to_all_single(out, own, group=self._handle, async_op=True),
            )
        return out.movedim(0, axis)

    def _run(self, what: str, x: torch.Tensor, start: Callable[[], Any]) -> None:
        """Waits for what `start` begins; PeerLost when it fails or takes too long."""
        begin = time.monotonic()
        try:
            work = start()
            while x.device.type == "cpu" and not work.is_completed():
                waited = time.monotonic() - begin
                if waited > self._timeout:
                    raise PeerLost(
                        f"{what} over {self.size} processes had no answer for {self._timeout:g} s: "
                        "a peer is dead or stuck; restart the group"
                    )
                time.sleep(0 if waited < _SPIN else _NAP)
            work.wait()
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0]
            if "nvalid scalar type" in first or "nsupported" in first:
                raise NotSupported(f"the transport has no {what} of {x.dtype}: {first}") from error
            raise PeerLost(
                f"{what} over {self.size} processes failed, a peer died: {first}"
            ) from error


class TorchCommunicator(Communicator):
    """Groups of a mesh of processes; torch.distributed must be initialised.

    mesh: axis -> size, the last axis varies fastest over the ranks; axes that it does not name have
    size 1. products: names for several mesh axes taken as one, such as {"ep": ("dp", "tp")}. Every
    process of the world makes it with the same arguments. `timeout`: seconds until PeerLost.
    """

    def __init__(
        self,
        mesh: Mapping[str, int],
        products: Mapping[str, Sequence[str]] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise NotSupported(
                "torch.distributed is not initialised; call init_process_group in every process"
            )
        members = {name: (name,) for name in mesh} | {
            name: tuple(axes) for name, axes in (products or {}).items()
        }
        _check(mesh, members)
        self._groups: dict[str, Group] = {}
        for name in sorted(members):
            self._groups[name] = _group(mesh, members[name], timeout)

    def axis(self, name: str) -> Group:
        if name not in AXES:
            raise NotSupported(f"there is no mesh axis {name!r}; known are {', '.join(AXES)}")
        return self._groups.get(name) or Alone()


def _check(mesh: Mapping[str, int], members: Mapping[str, Sequence[str]]) -> None:
    for name, axes in members.items():
        unknown = [axis for axis in (name, *axes) if axis not in AXES]
        missing = [axis for axis in axes if axis not in mesh]
        if unknown or missing:
            raise InvalidArgument(
                f"axis {name!r}: {(unknown or missing)[0]!r} is no axis of the mesh {dict(mesh)}"
            )
    if math.prod(mesh.values()) != dist.get_world_size():
        raise InvalidArgument(
            f"a mesh of {dict(mesh)} does not cover {dist.get_world_size()} processes"
        )


def _group(mesh: Mapping[str, int], axes: Sequence[str], timeout: float) -> Group:
    """The group of this process along `axes`; every process makes all groups, in one order."""
    names = list(mesh)
    along = [name for name in names if name in axes]
    if math.prod(mesh[name] for name in along) == 1:
        return Alone()
    across = [name for name in names if name not in axes]
    own: Group | None = None
    for fixed in itertools.product(*(range(mesh[name]) for name in across)):
        ranks = []
        for moving in itertools.product(*(range(mesh[name]) for name in along)):
            place = dict(zip(across, fixed)) | dict(zip(along, moving))
            rank = 0
            for name in names:
                rank = rank * mesh[name] + place[name]
            ranks.append(rank)
        handle = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
        if dist.get_rank() in ranks:
            own = TorchGroup(ranks, handle, timeout)
    assert own is not None, "every rank stands in one group of an axis"
    return own
