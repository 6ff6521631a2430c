"""Groups inside shard_map on one device; larger worlds are the conformance suite's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is missing: its collectives were not checked")

from jax.sharding import Mesh, PartitionSpec  # noqa: E402

from vllm_core.bindings.jax.collectives import JaxCommunicator, JaxGroup  # noqa: E402
from vllm_core.errors import InvalidArgument, NotSupported  # noqa: E402


def mesh(*names: str) -> Any:
    return Mesh(np.array(jax.devices("cpu")[:1]).reshape((1,) * len(names)), names)


def test_axes_of_one_are_the_identity_and_unknown_ones_are_refused() -> None:
    comm = JaxCommunicator(mesh("dp", "tp"), {"ep": ("dp", "tp")})
    x = object()
    for name in ("dp", "tp", "ep", "pp", "cp"):
        group: Any = comm.axis(name)
        assert group.size == 1 and group.all_reduce(x) is x
    with pytest.raises(NotSupported, match="no mesh axis 'xp'"):
        comm.axis("xp")


@pytest.mark.parametrize(("names", "products"), [(("xp",), {}), (("tp",), {"ep": ("dp",)})])
def test_a_mesh_that_does_not_fit_is_refused(names: tuple[str, ...], products: Any) -> None:
    with pytest.raises(InvalidArgument):
        JaxCommunicator(mesh(*names), products)


def test_collectives_run_in_shard_map_and_take_empty_axes() -> None:
    group = JaxGroup(("tp",), 1)

    def body(x: Any, nothing: Any) -> Any:
        return (
            group.all_reduce(x),
            group.all_gather(x, 1),
            group.reduce_scatter(x, -1),
            group.all_to_all(x, 0),
            group.all_gather(nothing, 0),
            group.reduce_scatter(nothing, 0),
            group.all_to_all(nothing, 1),
        )

    run: Any = jax.shard_map(
        body, mesh=mesh("tp"), in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    x, nothing = np.arange(6.0).reshape(2, 3), np.zeros((0, 4))
    *found, a, b, c = jax.jit(run)(x, nothing)
    assert all(np.array_equal(y, x) for y in found)
    assert a.shape == b.shape == c.shape == (0, 4)


def test_parts_that_would_not_be_equal_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="2 equal parts"):
        JaxGroup(("tp",), 2).all_to_all(jax.numpy.zeros(3), 0)
