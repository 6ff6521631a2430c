"""What a model is: frozen facts, one decoder that follows them, recipes that read configs."""

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
