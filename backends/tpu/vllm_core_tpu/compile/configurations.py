"""What is compiled: kinds of attention that models have, met by the steps that an engine makes.

Knows: shapes of models. Does not know: kernels, compilers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup
from vllm_core.ops import BucketKey

CONTEXT = 8192
"""Tokens that a table covers."""
LAYERS = 4
BLOCKS = 512


@dataclass(frozen=True)
class Kind:
    """One kind of attention layer."""

    name: str
    kv_heads: int
    queries_per_kv: int
    dim: int
    dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lse: bool = False
    block_tokens: int = 32

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_q_heads=self.kv_heads * self.queries_per_kv,
            num_kv_heads=self.kv_heads,
            dim_qk=self.dim,
            dim_v=self.dim,
            scale=self.dim**-0.5,
            kv=KVFormat(self.dtype),
            group=0,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    @property
    def group(self) -> KVGroup:
        kind: Any = "full" if self.window is None else "window"
        return KVGroup(0, kind, self.block_tokens, LAYERS, self.spec, 0)

    def key(self, step: str) -> BucketKey:
        """The bucket of a step of STEPS."""
        tokens, rows = STEPS[step]
        return BucketKey(tokens, rows, (CONTEXT // self.block_tokens,))


STEPS = {"decode": (64, 64), "mixed": (256, 64), "prefill": (1024, 16)}
"""Name -> (tokens, rows)."""

KINDS = (
    Kind("llama-8b", kv_heads=8, queries_per_kv=4, dim=128),
    Kind("llama-8b-lse", kv_heads=8, queries_per_kv=4, dim=128, lse=True),
    Kind("llama-8b-float32", kv_heads=8, queries_per_kv=4, dim=128, dtype="float32"),
    Kind("qwen-0.5b", kv_heads=2, queries_per_kv=7, dim=64),
    Kind("gemma", kv_heads=4, queries_per_kv=2, dim=256, window=4096, softcap=50.0),
    Kind("gpt-oss", kv_heads=8, queries_per_kv=8, dim=64, window=128, sinks=True),
    Kind("mha", kv_heads=32, queries_per_kv=1, dim=128),
    Kind("mqa", kv_heads=1, queries_per_kv=8, dim=128),
    Kind("float32-small", kv_heads=2, queries_per_kv=2, dim=16, dtype="float32"),
)
_COMMON = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b-step": (
        "LlamaConfig",
        _COMMON | {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
    "gemma-3-1b-step": (
        "Gemma3TextConfig",
        _COMMON | {
            "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 256, "sliding_window": 512,
        },
    ),
    "moe-step": (
        "Qwen3MoeConfig",
        _COMMON | {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_experts": 32, "num_experts_per_tok": 8,
            "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}  # fmt: skip
"""Name -> (class of transformers, fields)."""
MODEL_TARGETS = ("v5e", "7x")
QUICK = (("llama-8b", "decode"), ("qwen-0.5b", "mixed"))
"""(kind, step): K and V in planes of their own, and packed in one."""


def kernel_work() -> tuple[tuple[str, str], ...]:
    """Every (kind, step)."""
    return tuple((kind.name, step) for kind in KINDS for step in STEPS)


def model_work(target: str) -> tuple[tuple[str, str], ...]:
    """Every (model, step) that is compiled for the target."""
    if target not in MODEL_TARGETS:
        return ()
    return tuple((model, step) for model in MODELS for step in ("decode", "prefill"))


def find(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)
