"""Meshes of processes in one process: what needs no peer. Peers are the conformance suite's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: its collectives were not checked")

import torch.distributed as dist  # noqa: E402

from vllm_core.bindings.torch.collectives import TorchCommunicator, TorchGroup  # noqa: E402
from vllm_core.errors import InvalidArgument, NotSupported, PeerLost  # noqa: E402


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 's'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_it_says_what_to_call() -> None:
    with pytest.raises(NotSupported, match="init_process_group"):
        TorchCommunicator({"tp": 1})


def test_axes_of_one_are_the_identity_and_unknown_ones_are_refused(world: None) -> None:
    comm = TorchCommunicator({"dp": 1, "tp": 1}, {"ep": ("dp", "tp")})
    x = torch.arange(3)
    for name in ("dp", "tp", "ep", "pp", "cp"):
        assert comm.axis(name).size == 1 and comm.axis(name).all_reduce(x) is x
    with pytest.raises(NotSupported, match="no mesh axis 'xp'"):
        comm.axis("xp")


@pytest.mark.parametrize(
    ("mesh", "products"), [({"tp": 2}, {}), ({"xp": 1}, {}), ({"tp": 1}, {"ep": ("dp", "tp")})]
)
def test_a_mesh_that_does_not_fit_is_refused(world: None, mesh: Any, products: Any) -> None:
    with pytest.raises(InvalidArgument):
        TorchCommunicator(mesh, products)


def group(timeout: float = 1.0) -> TorchGroup:
    """A group of the only process: collectives really run."""
    return TorchGroup([0], dist.new_group([0]), timeout)


def test_collectives_leave_their_argument_and_take_any_layout(world: None) -> None:
    own = group()
    x = torch.arange(6.0).reshape(2, 3).T
    for found in (own.all_reduce(x), own.all_gather(x, 1), own.reduce_scatter(x, 0)):
        assert torch.equal(found, x) and found.data_ptr() != x.data_ptr()
    assert torch.equal(own.all_to_all(x, -1), x)


def test_parts_that_would_not_be_equal_are_refused(world: None) -> None:
    own = group()
    own.size = 2
    with pytest.raises(InvalidArgument, match="2 equal parts"):
        own.all_to_all(torch.zeros(3), 0)


def test_a_collective_that_never_ends_is_a_lost_peer(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never:
        def is_completed(self) -> bool:
            return False

    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: Never())
    with pytest.raises(PeerLost, match=r"no answer for 0\.05 s"):
        group(0.05).all_reduce(torch.ones(2))


def test_a_broken_connection_is_a_lost_peer(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(PeerLost, match="Connection closed"):
        group().all_reduce(torch.ones(2))
