"""The TPUs that are compiled for, and what a process needs in its environment to do so.

Knows: names of chips, libtpu's variables. Does not know: kernels.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

TARGETS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
"""Name -> the smallest topology that the compiler knows; one device of it is compiled for."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else minutes of asking a cloud's metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # need not be the target
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process per machine, by a lock file
}


def environment(dump: Path | None = None) -> dict[str, str]:
    """What a process must be started with; `dump`: where the compiler leaves its schedules."""
    if dump is None:
        return dict(ENVIRONMENT)
    passes = "--xla_jf_dump_llo_pass_label_regex=(final_bundles|final_hlo|post-delay-converter).*"
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true {passes}"
    return {**ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}


def why_not() -> str | None:
    """What is missing here; None: nothing."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed; pip install 'vllm-core-tpu[device]' brings it"
    return None


def versions() -> dict[str, str]:
    """Of what decides the result."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def sharding(target: str) -> Any:
    """Arrays on one device of the target, in a process with the environment of above."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target])
    return jax.sharding.SingleDeviceSharding(topology.devices[0])
