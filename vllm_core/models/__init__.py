"""What a model is: frozen facts, the decoder that follows them, and recipes that read a config into them."""

from __future__ import annotations

from vllm_core.models.recipe import Recipe
from vllm_core.models.registry import find_recipe, known_architectures
from vllm_core.models.spec import (
    FFNSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
    kv_groups,
)

__all__ = [
    "FFNSpec",
    "LayerSpec",
    "MoESpec",
    "ModelSpec",
    "Recipe",
    "RopeSpec",
    "find_recipe",
    "known_architectures",
    "kv_groups",
]
