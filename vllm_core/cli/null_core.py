"""The engine's loop over the null backend: what the host does, without a model.

Knows: the smallest model that has a KV cache, sizes. Does not know: what is measured.
"""

from __future__ import annotations

from vllm_core.backend import AttentionSpec, KVFormat
from vllm_core.backend.null import NullAttention, NullRuntime
from vllm_core.engine.core import EngineCore
from vllm_core.engine.limits import Limits
from vllm_core.models.spec import FFNSpec, LayerSpec, ModelSpec, kv_groups
from vllm_core.runner.memory import AHEAD, choose_block_tokens
from vllm_core.runner.runner import ModelRunner, Sizes

VOCAB_SIZE = 49152
_ATTENTION = AttentionSpec(4, 4, 16, 16, 0.25, KVFormat("float32"), group=0)
_LAYER = LayerSpec(_ATTENTION, 0, 0, None, FFNSpec(64, "silu", gated=True), "rms", 1e-5)


def default_block_size() -> int:
    """What an engine takes when nobody names a block size."""
    return choose_block_tokens(NullAttention(), (_ATTENTION,), None)


def open_null_core(
    *, num_rows: int, context: int, block_size: int, num_blocks: int, token_budget: int
) -> EngineCore:
    """One layer of full attention; `num_blocks` counts the null block, as everywhere."""
    spec = ModelSpec(
        "none", VOCAB_SIZE, 64, (_LAYER,), (_ATTENTION,), (), "rms", 1e-5, context, True
    )
    sizes = Sizes(num_rows, context + AHEAD, token_budget, num_rows, 8, {0: num_blocks})
    runner = ModelRunner(NullRuntime(), spec, {}, kv_groups(spec, block_size), sizes)
    limits = Limits(
        num_rows=num_rows,
        token_budget=token_budget,
        max_model_len=context,
        num_history_slots=num_rows,
        num_bias_slots=8,
        max_draws=num_rows,
    )
    return EngineCore(runner, limits)
