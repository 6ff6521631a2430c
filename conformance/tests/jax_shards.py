"""Judges the JAX binding's groups over eight fake devices: python jax_shards.py WORLD...

XLA_FLAGS must ask for the devices before jax starts, hence a process of its own. Prints one line of
JSON per world. "2x4" is a mesh.

Knows: shard_map. Does not know: what is right (the suite's judge).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vllm_core.backend.communicator import Group
from vllm_core.bindings.jax.collectives import JaxCommunicator
from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.distributed_judge import collective, inputs, judge, problems

DTYPES = ("bfloat16",)


def judged(mesh: Mesh, group: Group, names: tuple[str, ...], seed: int) -> Evidence:
    """All problems in one program, every shard's part; devices of other groups do the same."""
    found, world = Evidence(), group.size
    everyone = PartitionSpec(mesh.axis_names)
    places = np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1)
    along = [mesh.axis_names.index(name) for name in names]
    place_along: Any = np.ravel_multi_index(places[along], [mesh.devices.shape[i] for i in along])
    ranks: list[int] = place_along.tolist()

    some = list(problems(world, DTYPES))
    given = [inputs(problem, world, seed) for problem in some]
    xs = [np.stack([own[rank] for rank in ranks]) for own in given]
    fns = [collective(group, problem) for problem in some]

    def shard(own: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        place = jax.numpy.full((1,), group.index(), "int32")
        return [fn(x[0])[None] for fn, x in zip(fns, own, strict=True)], place

    run: Any = jax.shard_map(
        shard, mesh=mesh, in_specs=everyone, out_specs=everyone, check_vma=False
    )
    got, index = jax.jit(run)(xs)
    assert index.tolist() == ranks, "a device's index is its place along the axis"
    for problem, own, result in zip(some, given, got, strict=True):
        for device, rank in enumerate(ranks):
            found += judge(problem, own, rank, np.asarray(result)[device])
    return found


def main() -> None:
    for world in sys.argv[1:]:
        sizes = [int(n) for n in world.split("x")]
        names = ("tp",) if len(sizes) == 1 else ("dp", "tp")
        devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
        mesh = Mesh(devices, names)
        comm = JaxCommunicator(mesh, {"ep": names})
        result: dict[str, Any] = {"world": world}
        try:
            found = Evidence()
            for seed, (axis, along) in enumerate({**{n: (n,) for n in names}, "ep": names}.items()):
                found += judged(mesh, comm.axis(axis), along, seed)
            result["checks"] = found.checks
        except Failed as failure:
            result["failed"] = failure.sentence
        print(json.dumps(result))


if __name__ == "__main__":
    main()
