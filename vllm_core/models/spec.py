"""A model as frozen, hashable facts.

Knows: layers, sizes, which layers share a block table. Does not know: configs, weights, devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions of the first `dim` dims of each head."""

    dim: int
    inverse_frequency: tuple[float, ...]
    """dim/2 float32 values."""
    scale: float
    """Multiplies cos and sin (yarn's attention factor)."""


@dataclass(frozen=True)
class FFNSpec:
    """down(act(gate(x)) * up(x)) when gated, else down(act(up(x)))."""

    size: int
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"]
    gated: bool
    bias: bool = False


@dataclass(frozen=True)
class MoESpec:
    """A router over gated silu experts."""

    num_experts: int
    top_k: int
    size: int
    renormalize: bool


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. Equal specs mean equal programs and shapes: such layers may be stacked."""

    attention: AttentionSpec
    attention_index: int
    """Index into ModelSpec.attention_specs, and so into the plans of a step."""
    kv_layer: int = field(compare=False)
    """Index of the layer within its KV group."""
    rope: int | None
    """Index into ModelSpec.ropes; None: the layer rotates nothing."""
    ffn: FFNSpec | MoESpec
    norm: NormKind
    eps: float
    is_sandwich: bool = False
    """Norms stand before and behind each sublayer, not only before."""
    qk_norm: bool = False
    """Each head of Q and K is normalised before rope."""
    qkv_bias: bool = False
    output_bias: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the decoder needs beside parameters."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    attention_specs: tuple[AttentionSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm: NormKind
    """Of the final norm."""
    eps: float
    max_model_len: int
    """The context that the config claims."""
    tied_embeddings: bool
    embedding_scale: float = 1.0
    """Multiplies token embeddings; already rounded to the model's dtype."""
    position_offset: int | None = None
    """Row of the learned position table for position 0; None: there is no table."""
    logit_softcap: float | None = None
    logit_scale: float = 1.0

    def with_kv_format(self, kv: KVFormat) -> ModelSpec:
        """The same model with this KV format in all its layers."""
        layers = [
            replace(layer, attention=replace(layer.attention, kv=kv)) for layer in self.layers
        ]
        specs = [replace(attention, kv=kv) for attention in self.attention_specs]
        return replace(self, layers=tuple(layers), attention_specs=tuple(specs))


def kv_groups(spec: ModelSpec, block_tokens: int) -> tuple[KVGroup, ...]:
    """The KV groups by id, all with blocks of `block_tokens`.

    Groups whose blocks have the same shape share a pool, and so one space of block ids; pools are
    numbered from 0.
    """
    pools: dict[tuple[object, ...], int] = {}
    groups = []
    for id in range(1 + max(layer.attention.group for layer in spec.layers)):
        members = [layer.attention for layer in spec.layers if layer.attention.group == id]
        first = members[0]
        shape = (len(members), first.num_kv_heads, first.dim_qk, first.dim_v, first.kv)
        groups.append(
            KVGroup(
                id=id,
                kind="full" if first.window is None else "window",
                block_tokens=block_tokens,
                layers=len(members),
                spec=first,
                pool=pools.setdefault(shape, len(pools)),
            )
        )
    return tuple(groups)
