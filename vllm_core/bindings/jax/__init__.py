"""The JAX binding: portable ops, paged attention and a runtime on whatever device jax drives."""

from __future__ import annotations

from vllm_core.bindings.jax.attention import JaxAttention
from vllm_core.bindings.jax.ops import JaxOps
from vllm_core.bindings.jax.runtime import CAPABILITIES, JaxRuntime, open_runtime

__all__ = ["CAPABILITIES", "JaxAttention", "JaxOps", "JaxRuntime", "open_runtime"]
