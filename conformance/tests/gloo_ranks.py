"""Judges the torch binding's groups over gloo in real processes: gloo_ranks.py FOLDER WORLD...

One process imports torch and forks the ranks of each world, so that the import is paid once. Each
rank writes what it found into the folder: {"checks": n} or {"failed": sentence}. A world "3-killed"
has a last rank that dies before the second collective, "3-frozen" one that never answers, and
"2x2" is a mesh.

Knows: processes, a rendezvous by file. Does not know: what is right (the suite's judge).
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from vllm_core.bindings.torch.collectives import TorchCommunicator
from vllm_core.bindings.torch.convert import from_host, to_host
from vllm_core_conformance.case import Evidence, Failed
from vllm_core_conformance.cases.distributed_judge import judge_group, judge_lost_peer

DTYPES = ("float32", "bfloat16", "float16", "int32")
PATIENCE = 2.0
"""Declared seconds until a peer counts as lost."""
DEADLINE = 60.0


def judged(comm: TorchCommunicator, axes: tuple[str, ...]) -> Evidence:
    found = Evidence()
    for seed, axis in enumerate(axes):
        group = comm.axis(axis)
        assert isinstance(group.index(), int)
        found += judge_group(
            group, group.index(), seed, lambda x: from_host(np.array(x)), to_host, DTYPES
        )
    return found


def rank_main(folder: Path, world: str, rank: int) -> dict[str, object]:
    torch.set_num_threads(1)
    kind = world.partition("-")[2]
    sizes = [int(size) for size in world.partition("-")[0].split("x")]
    count = int(np.prod(sizes))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / world}.store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=DEADLINE),
    )
    if len(sizes) == 2:
        mesh = {"dp": sizes[0], "tp": sizes[1]}
        comm = TorchCommunicator(mesh, {"ep": ("tp", "dp")}, DEADLINE)
        return {"checks": judged(comm, ("dp", "tp", "ep", "pp")).checks}
    comm = TorchCommunicator({"tp": count}, timeout=PATIENCE if kind else DEADLINE)
    group = comm.axis("tp")
    if not kind:
        return {"checks": judged(comm, ("tp",)).checks}
    group.all_reduce(torch.ones(5))
    if rank == count - 1:
        if kind == "killed":
            os._exit(0)
        time.sleep(3 * PATIENCE)
        os._exit(0)
    return {"checks": judge_lost_peer(lambda: group.all_reduce(torch.ones(5)), PATIENCE).checks}


def child(folder: Path, world: str, rank: int) -> None:
    try:
        found = rank_main(folder, world, rank)
    except Failed as failure:
        found = {"failed": failure.sentence}
    except BaseException as error:  # the parent must hear of it
        found = {"failed": f"{type(error).__name__}: {error}"}
    (folder / f"{world}.{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group that lost a peer cannot be torn down in order


def main() -> None:
    folder = Path(sys.argv[1])
    for world in sys.argv[2:]:
        count = int(np.prod([int(n) for n in world.partition("-")[0].split("x")]))
        children = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                child(folder, world, rank)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
