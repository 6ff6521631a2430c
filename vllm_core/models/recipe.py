"""What a recipe is, and how one reads a config.

A recipe turns a transformers config into a ModelSpec, and a ModelSpec into weight rules. A fact of
the config that changes the mathematics is followed or refused, never ignored.

Knows: typed reading of configs, numbering of layers. Does not know: any family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from vllm_core.backend import AttentionSpec, KVFormat
from vllm_core.errors import ModelError, NotSupported
from vllm_core.models.spec import LayerSpec, ModelSpec
from vllm_core.weights.rules import WeightRules

Config: TypeAlias = Any
"""A transformers PretrainedConfig."""

Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu", "relu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Recipe:
    """One family."""

    architectures: tuple[str, ...]
    """Names in `config.architectures` that it serves."""
    model_type: str
    spec: Callable[[Config, str], ModelSpec]
    """(config, dtype of model and KV cache) -> spec. Raises ModelError, NotSupported."""
    weights: Callable[[ModelSpec, Config], WeightRules]


def count(config: Config, name: str) -> int:
    """A field that must be a whole number of at least 1."""
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"the config's {name} must be a whole number of at least 1, not {value!r}")
    return value


def number(config: Config, name: str) -> float:
    """A field that must be a number above 0."""
    value = getattr(config, name, None)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"the config's {name} must be a number above 0, not {value!r}")
    return float(value)


def optional_number(config: Config, name: str) -> float | None:
    """The same, or None where it is not set."""
    return None if getattr(config, name, None) is None else number(config, name)


def flag(config: Config, name: str) -> bool:
    """A field that is False where it is not set."""
    return bool(getattr(config, name, None))


def activation(config: Config, name: str, allowed: Sequence[Activation]) -> Activation:
    """A field that names an activation."""
    value = getattr(config, name, None)
    found = _ACTIVATIONS.get(value or "")
    if found is None or found not in allowed:
        known = ", ".join(key for key, kind in _ACTIVATIONS.items() if kind in allowed)
        raise NotSupported(f"the config's {name} is {value!r}; known here are {known}")
    return found


def refuse(config: Config, refused: Mapping[str, object]) -> None:
    """NotSupported for a field with another value than the only one implemented; None passes."""
    for name, only in refused.items():
        value = getattr(config, name, None)
        if value is not None and value != only:
            raise NotSupported(
                f"the config sets {name} to {value!r}, but only {only!r} is supported"
            )


def refuse_common(config: Config) -> None:
    """What no family supports."""
    if getattr(config, "quantization_config", None) is not None:
        raise NotSupported(
            "the checkpoint is quantised (its config has a quantization_config), which is not "
            "supported; use one in bfloat16, float16 or float32, or a GGUF file"
        )
    if getattr(config, "is_heterogeneous", False):
        raise NotSupported("the config differs from layer to layer, which is not supported")
    refuse(config, {"add_cross_attention": False, "is_encoder_decoder": False})


def head_counts(config: Config) -> tuple[int, int, int]:
    """Query heads, KV heads, head size."""
    num_heads = count(config, "num_attention_heads")
    num_kv_heads = num_heads
    if getattr(config, "num_key_value_heads", None) is not None:
        num_kv_heads = count(config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ModelError(
            f"the config's {num_heads} attention heads do not divide over {num_kv_heads} KV heads"
        )
    if getattr(config, "head_dim", None) is not None:
        return num_heads, num_kv_heads, count(config, "head_dim")
    hidden_size = count(config, "hidden_size")
    if hidden_size % num_heads:
        raise ModelError(
            f"the config's hidden_size {hidden_size} does not divide over its {num_heads} heads"
        )
    return num_heads, num_kv_heads, hidden_size // num_heads


def attention(
    heads: tuple[int, int, int],
    dtype: str,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """Causal self-attention; `number_layers` sets its group."""
    num_heads, num_kv_heads, dim = heads
    return AttentionSpec(
        num_q_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dim_qk=dim,
        dim_v=dim,
        scale=scale,
        kv=KVFormat(dtype),
        group=0,
        window=window,
        softcap=softcap,
    )


def number_layers(
    layers: Sequence[LayerSpec],
) -> tuple[tuple[LayerSpec, ...], tuple[AttentionSpec, ...]]:
    """Layers with KV group, place in it and attention index, and the distinct attention specs.

    Layers share a group, and so a block table, when their caches have the same shape and window.
    """
    groups: dict[tuple[object, ...], int] = {}
    sizes: dict[int, int] = {}
    specs: dict[AttentionSpec, int] = {}
    numbered = []
    for layer in layers:
        a = layer.attention
        key = (a.num_kv_heads, a.dim_qk, a.dim_v, a.window, a.kv)
        group = groups.setdefault(key, len(groups))
        a = replace(a, group=group)
        place = sizes.get(group, 0)
        sizes[group] = place + 1
        index = specs.setdefault(a, len(specs))
        numbered.append(replace(layer, attention=a, attention_index=index, kv_layer=place))
    return tuple(numbered), tuple(specs)
