"""Plans the device's memory before weights load, from config and sizes alone.

    KV cache = utilization x free - weights - largest step - state

Knows: bytes. Does not know: allocators, devices' names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_core.backend import AttentionBackend, AttentionSpec, Capabilities, KVGroup, MemoryReport
from vllm_core.config import EngineConfig
from vllm_core.errors import CapacityError, InvalidArgument
from vllm_core.models.spec import FFNSpec, ModelSpec, kv_groups
from vllm_core.ops import NUM_COLUMNS, BucketKey

DEFAULT_HOST_SHARE = 4 << 30
"""Bytes of KV cache where the device's memory is the host's and nobody said otherwise."""
SLOT_BYTES = 64 << 20
"""Most bytes of history, and of bias, unless eight rows of them need more."""
MAX_WASTE = 0.04
MEAN_LIVE_TOKENS = 500
"""Mean live length of the served mix: the last block wastes half of itself."""
AHEAD = 4
"""Tokens that a sequence may run past its end: one per step in flight, and room."""


@dataclass(frozen=True)
class MemoryPlan:
    """Who gets which bytes, and what follows."""

    lines: tuple[tuple[str, int], ...]
    """(what, bytes), as a table for people."""
    groups: tuple[KVGroup, ...]
    num_blocks: dict[int, int]
    """By pool, the null block included."""
    max_model_len: int
    expected_waste: float
    num_history_slots: int
    num_bias_slots: int

    @property
    def block_tokens(self) -> int:
        return self.groups[0].block_tokens


def expected_waste(block_tokens: int) -> float:
    """Share of allocated KV slots that hold nothing: half a block per sequence."""
    return block_tokens / 2 / MEAN_LIVE_TOKENS


def choose_block_tokens(
    attention: AttentionBackend, specs: tuple[AttentionSpec, ...], wanted: int | None
) -> int:
    """The wanted size, else the first of the backend's list that wastes at most 4 %."""
    offers = [attention.block_tokens(spec) for spec in specs]
    common = [size for size in offers[0] if all(size in offer for offer in offers)]
    if wanted is not None:
        if wanted not in common:
            raise InvalidArgument(
                f"block_size {wanted} is not offered by the backend; it offers {sorted(common)}"
            )
        return wanted
    return next((size for size in common if expected_waste(size) <= MAX_WASTE), min(common))


def workspace(spec: ModelSpec, key: BucketKey, block_tokens: tuple[int, ...], dtype: str) -> int:
    """Estimate of a step's peak bytes beside parameters, state and cache."""
    size = np.dtype("float32").itemsize if dtype != "float64" else 8
    widest = max(
        (2 if isinstance(layer.ffn, FFNSpec) else 2 * layer.ffn.top_k) * layer.ffn.size
        for layer in spec.layers
    )
    attention = spec.attention_specs[0]
    qkv = (attention.num_q_heads + 2 * attention.num_kv_heads) * attention.dim_qk
    activations = key.tokens * (4 * spec.hidden_size + 2 * qkv + 2 * widest) * size
    logits = 4 * key.rows * spec.vocab_size * size
    context = max(w * b for w, b in zip(key.widths, block_tokens, strict=True))
    gathered = 2 * min(key.rows, 64) * context * attention.num_kv_heads * attention.dim_qk * size
    return activations + logits + gathered


def plan_memory(
    spec: ModelSpec,
    attention: AttentionBackend,
    caps: Capabilities,
    report: MemoryReport,
    config: EngineConfig,
    param_bytes: int,
    token_budget: int,
    dtype: str,
) -> MemoryPlan:
    """Decides block size, blocks per pool and the longest context. CapacityError when it cannot
    work."""
    groups = kv_groups(
        spec, choose_block_tokens(attention, spec.attention_specs, config.block_size)
    )
    length = min(config.max_model_len or spec.max_model_len, spec.max_model_len)
    if config.max_model_len is not None and config.max_model_len > spec.max_model_len:
        raise InvalidArgument(
            f"max_model_len {config.max_model_len} is beyond the model's context of "
            f"{spec.max_model_len}; lower it"
        )
    history = max(min(8, config.max_num_seqs), SLOT_BYTES // (4 * length))
    history = min(config.max_num_seqs, history)
    bias = max(min(8, config.max_num_seqs), SLOT_BYTES // (4 * spec.vocab_size))
    bias = min(config.max_num_seqs, bias)
    sizes = tuple(g.block_tokens for g in groups)
    widths = tuple(-(-(length + AHEAD) // size) for size in sizes)
    state = 4 * (config.max_num_seqs + 1) * (sum(widths) + NUM_COLUMNS + 2)
    state += 4 * ((history + 1) * (length + AHEAD) + (bias + 1) * spec.vocab_size)
    key = BucketKey(token_budget, config.max_num_seqs, widths)
    step = workspace(spec, key, sizes, dtype)

    usable = int(report.free * config.memory_utilization)
    room = usable - param_bytes - step - state
    if config.kv_cache_memory is not None:
        room = config.kv_cache_memory
    elif caps.shares_host_memory:
        room = min(room, DEFAULT_HOST_SHARE)
    block_bytes = {g.pool: attention.block_bytes(g) for g in groups}
    if config.num_kv_blocks is not None:
        num_blocks = dict.fromkeys(block_bytes, config.num_kv_blocks)
    else:
        length, num_blocks = _share(groups, block_bytes, room, length, config, token_budget)
    kv = sum(num_blocks[pool] * block_bytes[pool] for pool in block_bytes)
    left = report.free - param_bytes - state
    if kv > left:
        raise CapacityError(
            f"a KV cache of {kv >> 20} MiB was asked for, but beside weights and state the device "
            f"has {max(0, left) >> 20} MiB free; lower kv_cache_memory, num_kv_blocks or "
            "max_num_seqs"
        )
    lines = (
        ("free on the device", report.free),
        (f"usable at {config.memory_utilization:.0%}", usable),
        ("weights", param_bytes),
        ("largest step (estimate)", step),
        ("state of rows", state),
        ("KV cache", kv),
    )
    waste = expected_waste(groups[0].block_tokens)
    return MemoryPlan(lines, groups, num_blocks, length, waste, history, bias)


def _share(
    groups: tuple[KVGroup, ...],
    block_bytes: dict[int, int],
    room: int,
    length: int,
    config: EngineConfig,
    chunk: int,
) -> tuple[int, dict[int, int]]:
    """(longest context, blocks per pool): every pool holds as many longest sequences as the
    others."""
    size = groups[0].block_tokens
    nulls = sum(block_bytes.values())

    def blocks_of_one(length: int) -> dict[int, int]:
        need = dict.fromkeys(block_bytes, 0)
        for group in groups:
            need[group.pool] += group.blocks_held(length, chunk)
        return need

    def bytes_of_one(length: int) -> int:
        return sum(n * block_bytes[pool] for pool, n in blocks_of_one(length).items())

    if bytes_of_one(length) > room - nulls:
        low, high = 0, length
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if bytes_of_one(middle) <= room - nulls else (low, middle)
        if config.max_model_len is not None or low < 2 * size:
            raise CapacityError(
                f"the KV cache cannot hold one sequence of {length} tokens: it needs "
                f"{bytes_of_one(length) >> 20} MiB and {max(0, room) >> 20} MiB are left; lower "
                "max_model_len, max_num_seqs or max_num_batched_tokens, or raise kv_cache_memory"
            )
        length = low
    copies = min((room - nulls) / bytes_of_one(length), config.max_num_seqs)
    return length, {pool: int(n * copies) + 1 for pool, n in blocks_of_one(length).items()}
