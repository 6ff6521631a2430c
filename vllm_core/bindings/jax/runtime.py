"""Runs programs through jax.jit: static shapes per bucket, donated state and cache, late results.

Knows: jit, donation, buckets. Does not know: what a program computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vllm_core.backend import (
    AttentionPlan,
    BucketPolicy,
    Capabilities,
    DeviceStep,
    Executable,
    HostStep,
    MemoryReport,
    OpenConfig,
    Program,
    RectangleTables,
    Runtime,
    SingleDevice,
)
from vllm_core.bindings.jax.attention import DTYPES, JaxAttention
from vllm_core.bindings.jax.memory import allocating, report
from vllm_core.bindings.jax.ops import JaxOps
from vllm_core.bindings.parts import SCHEMES, dense_tensors
from vllm_core.errors import BackendError
from vllm_core.ops import BucketKey, Features, HostArray, Param, ParamSpec, Part
from vllm_core.params import MAX_LOGPROBS

_FULL = Features(draw=True, filters=True, penalties=True, bias=True)
_FEATURES = (
    Features(),
    Features(draw=True),
    Features(logprobs=MAX_LOGPROBS, keep_hidden=True),
    _FULL,
    replace(_FULL, logprobs=MAX_LOGPROBS, keep_hidden=True),
)
"""From the cheapest to the one that covers all: few, since each is a compilation per shape."""


def _flatten_param(param: Param) -> tuple[tuple[Any, ...], Any]:
    names = tuple(sorted(param.arrays))
    return tuple(param.arrays[name] for name in names), (names, param.static)


def _unflatten_param(facts: Any, arrays: Any) -> Param:
    names, static = facts
    return Param(dict(zip(names, arrays)), static)


jax.tree_util.register_pytree_node(Param, _flatten_param, _unflatten_param)
jax.tree_util.register_pytree_node(
    AttentionPlan,
    lambda plan: ((plan.arrays,), (plan.spec, plan.group, plan.static)),
    lambda facts, arrays: AttentionPlan(arrays[0], *facts),
)


class OnItsWay:
    """A tree of device arrays whose copies to the host have been started."""

    def __init__(self, value: Any) -> None:
        self._value = value
        for leaf in jax.tree_util.tree_leaves(value):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()

    def wait(self) -> Any:
        return jax.tree_util.tree_map(np.array, self._value)


CAPABILITIES = Capabilities(
    dtypes=frozenset(DTYPES),
    default_dtype="bfloat16",
    schemes=SCHEMES,
    static_shapes=True,
)
"""Before a device is known."""


class JaxRuntime(Runtime):
    """One device. What is made here is uncommitted: first and later calls look alike to jit."""

    def __init__(self, device: jax.Device, dtype: str, checkpoint_dtype: str | None = None) -> None:
        is_host = device.platform == "cpu"
        default = "float32" if is_host else "bfloat16"
        self.caps = replace(CAPABILITIES, default_dtype=default, shares_host_memory=is_host)
        self.dtype = self.caps.choose_dtype(dtype, checkpoint_dtype)
        self.ops = JaxOps(device)
        self.attention = JaxAttention(device, self.dtype)
        self.block_tables = RectangleTables(self.ops)
        self.comm = SingleDevice()
        self._device = device
        self._num_compilations = 0

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        dtype = "float32" if spec.role == "norm" else self.dtype
        arrays = {}
        for name, host in _join(spec, parts, jnp.dtype(dtype)).items():
            with allocating(self._device, spec.name):
                # the copy is private, so that a device that shares the host's memory may keep it
                arrays[name] = jax.device_put(host)
        return Param(arrays)

    def unload(self, param: Param) -> dict[str, HostArray]:
        return {name: np.array(x) for name, x in param.arrays.items()}

    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        step = DeviceStep(packed.copy(), self.attention.plan_host(host, key))
        with jax.default_device(self._device):
            uploaded: DeviceStep = jax.device_put(step)
        return uploaded

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        def traced(*args: Any) -> tuple[Any, ...]:
            self._num_compilations += 1  # the body runs once per shape
            return program.fn(*args)

        traced.__name__ = program.name
        compiled = jax.jit(traced, donate_argnums=program.consumes)

        def run(*args: Any) -> tuple[Any, ...]:
            with allocating(self._device, f"program {program.name}"):
                results: tuple[Any, ...] = compiled(*args)
            return results

        return run

    def fetch(self, value: Any) -> OnItsWay:
        return OnItsWay(value)

    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        """Tokens by powers of four, three counts of rows, one width.

        One, because the attention stops at the longest row by itself.
        """
        rows = {size for size in (16, 64) if size < max_rows} | {max_rows}
        tokens = {size for size in (16 << shift for shift in range(0, 24, 2)) if size < max_tokens}
        return BucketPolicy(
            tokens=tuple(sorted(tokens | {max_tokens})),
            rows=tuple(sorted(rows)),
            widths=(max_width,),
            features=_FEATURES,
        )

    def memory(self) -> MemoryReport:
        return report(self._device)

    def num_compilations(self) -> int:
        return self._num_compilations

    def close(self) -> None:
        """Arrays live as long as their owners; nothing else is held."""


def open_runtime(config: OpenConfig) -> JaxRuntime:
    """options: platform, one of jax's ("cpu", "gpu", ...); by default the one that jax prefers."""
    platform = config.options.get("platform")
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError as error:
        raise BackendError(f"jax cannot open platform {platform!r}: {error}") from error
    if config.device_index >= len(devices):
        raise BackendError(
            f"device {config.device_index} was asked for, but jax sees {len(devices)}: {devices}"
        )
    return JaxRuntime(devices[config.device_index], config.dtype, config.checkpoint_dtype)


def _join(spec: ParamSpec, parts: Sequence[Part], dtype: np.dtype[Any]) -> dict[str, HostArray]:
    """Private copies of dense parts joined along the output axis."""
    joined: dict[str, HostArray] = {
        name: np.concatenate(tensors, dtype=dtype, casting="unsafe")
        for name, tensors in dense_tensors(spec, parts).items()
    }
    spec.check(joined["weight"].shape)
    return joined
