"""Cheap looks at the machine for the bindings: no framework is imported, so that listing is fast.

Knows: where packages would be found. Does not know: the packages.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from vllm_core.backend import DeviceInfo, Probe


def probe_jax() -> Probe:
    """Whether jax could be imported; which devices it drives is known only once it is opened."""
    for package in ("jax", "jaxlib"):
        if find_spec(package) is None:
            return Probe(reason=f"{package} is not installed", fix="pip install jax")
    try:
        found = version("jax")
    except PackageNotFoundError:
        found = "of unknown version"
    device = DeviceInfo(index=0, kind="jax", arch="any", memory_bytes=0)
    return Probe([device], reason=f"jax {found} is installed; it looks for devices when opened")
