"""Finds the recipe of a config.

Knows: every recipe. Does not know: what is in them.
"""

from __future__ import annotations

import difflib

from vllm_core.errors import ModelError
from vllm_core.models.recipe import Config, Recipe
from vllm_core.models.recipes.gemma import GEMMA2, GEMMA3
from vllm_core.models.recipes.learned import GPT2, OPT
from vllm_core.models.recipes.llama import LLAMA, MISTRAL
from vllm_core.models.recipes.mixtral import MIXTRAL
from vllm_core.models.recipes.qwen import QWEN2, QWEN3, QWEN3_MOE

RECIPES = (GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, MIXTRAL, OPT, QWEN2, QWEN3, QWEN3_MOE)


def known_architectures() -> list[str]:
    """Every name in `config.architectures` that has a recipe."""
    return sorted(name for recipe in RECIPES for name in recipe.architectures)


def find_recipe(config: Config) -> Recipe:
    """By `config.architectures`, or by `config.model_type` where none is named.

    Raises ModelError, which names the closest known ones.
    """
    model_type = getattr(config, "model_type", None)
    named = list(getattr(config, "architectures", None) or ())
    for recipe in RECIPES:
        if recipe.model_type == model_type and (
            not named or set(named) & set(recipe.architectures)
        ):
            return recipe
    wanted = ", ".join(map(repr, named)) or f"model type {model_type!r}"
    raise ModelError(
        f"no recipe for {wanted} (model type {model_type!r}); close are "
        f"{', '.join(_close(named, model_type))}; `vllm-core models` lists all"
    )


def _close(named: list[str], model_type: str | None) -> list[str]:
    """Known architectures, the likeliest first."""
    by_type = {recipe.model_type: recipe.architectures[0] for recipe in RECIPES}
    found = [by_type[m] for m in difflib.get_close_matches(model_type or "", by_type, 3, 0.5)]
    for name in named:
        found += difflib.get_close_matches(name, known_architectures(), 3, 0.5)
    return list(dict.fromkeys(found))[:3] or known_architectures()
