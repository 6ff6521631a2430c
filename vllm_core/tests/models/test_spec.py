"""Groups, pools and equality of specs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_core.models import kv_groups
from vllm_core.tests.models.families import FAMILIES, spec_of


@pytest.mark.parametrize("name", FAMILIES)
def test_a_spec_is_hashable_and_the_same_config_gives_an_equal_one(name: str) -> None:
    assert spec_of(name) == spec_of(name)
    assert hash(spec_of(name)) == hash(spec_of(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_points_at_its_own_attention_spec_and_place_in_its_group(name: str) -> None:
    spec = spec_of(name)
    groups = kv_groups(spec, 16)
    places: dict[int, list[int]] = {group.id: [] for group in groups}
    for layer in spec.layers:
        assert spec.attention_specs[layer.attention_index] == layer.attention
        places[layer.attention.group].append(layer.kv_layer)
    for group in groups:
        assert places[group.id] == list(range(group.layers))


def test_layers_that_differ_only_in_their_place_are_equal_and_so_can_be_stacked() -> None:
    layers = spec_of("llama").layers
    assert layers[0] == layers[1] and layers[0].kv_layer != layers[1].kv_layer
    gemma = spec_of("gemma3").layers
    assert gemma[0] == gemma[6] and gemma[0] != gemma[5]


def test_a_model_without_windows_has_one_full_group() -> None:
    (group,) = kv_groups(spec_of("llama"), 16)
    assert (group.kind, group.block_tokens, group.layers, group.pool) == ("full", 16, 3, 0)


def test_windows_have_a_group_of_their_own() -> None:
    window, full = kv_groups(spec_of("gemma3"), 16)
    assert (window.kind, window.layers, window.spec.window) == ("window", 6, 5)
    assert (full.kind, full.layers, full.spec.window) == ("full", 1, None)


def test_groups_with_blocks_of_equal_shape_share_a_pool_and_others_do_not() -> None:
    assert [g.pool for g in kv_groups(spec_of("gemma2", num_hidden_layers=4), 16)] == [0, 0]
    assert [g.pool for g in kv_groups(spec_of("gemma2", num_hidden_layers=3), 16)] == [0, 1]


def test_the_scale_of_a_layer_does_not_split_its_group() -> None:
    spec = spec_of("gpt2-scaled-by-layer")
    assert len(spec.attention_specs) == 2
    assert len(kv_groups(spec, 16)) == 1


def test_the_kv_dtype_is_the_models() -> None:
    assert spec_of("llama", "bfloat16").attention_specs[0].kv.dtype == "bfloat16"


def test_gemmas_embedding_scale_is_rounded_to_the_models_dtype() -> None:
    assert spec_of("gemma2", "bfloat16", hidden_size=3072).embedding_scale == 55.5
    assert spec_of("gemma2", "float32", hidden_size=3072).embedding_scale == pytest.approx(55.42563)


def test_moe_layers_stand_where_the_config_says() -> None:
    layers = spec_of("qwen3-moe").layers
    assert [hasattr(layer.ffn, "top_k") for layer in layers] == [False, True, False, True]
    layers = spec_of("qwen3-moe-renormalised").layers
    assert [hasattr(layer.ffn, "top_k") for layer in layers] == [True, False, True]


def test_yarn_names_a_context_longer_than_the_configs_own_field() -> None:
    assert spec_of("qwen3-yarn", max_position_embeddings=16).max_model_len == 64
    assert spec_of("llama-linear").max_model_len == 64


def test_another_window_is_another_spec() -> None:
    spec = spec_of("mistral").attention_specs[0]
    assert spec != replace(spec, window=4)
