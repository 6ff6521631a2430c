"""The JAX binding's runtime with our attention; on a CPU its kernels are interpreted.

Knows: which platform jax drives. Does not know: kernels, models.
"""

from __future__ import annotations

from typing import Any

import jax

from vllm_core.backend import OpenConfig
from vllm_core.bindings.jax import JaxRuntime
from vllm_core.errors import BackendError
from vllm_core.log import get_logger
from vllm_core_tpu.attention import TpuAttention

logger = get_logger(__name__)


class TpuRuntime(JaxRuntime):
    """One device."""

    def __init__(self, device: jax.Device, dtype: str, checkpoint_dtype: str | None = None) -> None:
        super().__init__(device, dtype, checkpoint_dtype)
        self.attention = TpuAttention(device, device.platform != "tpu", self.dtype)


def open_runtime(config: OpenConfig) -> TpuRuntime:
    """options: platform, "tpu" or "cpu"; by default a TPU where jax finds one."""
    device = _device(config.options.get("platform"), config.device_index)
    return TpuRuntime(device, config.dtype, config.checkpoint_dtype)


def _device(platform: Any, index: int) -> jax.Device:
    wanted = [platform] if platform else ["tpu", "cpu"]
    for name in wanted:
        try:
            devices = jax.local_devices(backend=name)
        except RuntimeError as error:
            if name == wanted[-1]:
                raise BackendError(f"jax cannot open platform {name!r}: {error}") from error
            logger.info("no TPU (%s): kernels are interpreted on the CPU", error)
            continue
        if index >= len(devices):
            raise BackendError(
                f"device {index} was asked for, but jax sees {len(devices)}: {devices}"
            )
        return devices[index]
    raise AssertionError("unreachable")
