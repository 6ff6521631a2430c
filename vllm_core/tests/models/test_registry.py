"""Finding recipes, and refusing what no recipe covers."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_core.errors import ModelError, NotSupported
from vllm_core.models import find_recipe, known_architectures
from vllm_core.tests.models.families import FAMILIES, config_of, spec_of


class Config:
    """The two fields that a recipe is found by."""

    def __init__(self, model_type: str, *architectures: str) -> None:
        self.model_type, self.architectures = model_type, list(architectures)


def test_the_families_of_this_release_are_known() -> None:
    assert known_architectures() == [
        "GPT2LMHeadModel",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "OPTForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_without_architectures_is_found_by_its_model_type(name: str) -> None:
    config = config_of(name)
    assert config.architectures is None
    assert find_recipe(config).model_type == config.model_type


def test_an_unknown_architecture_names_its_neighbours() -> None:
    with pytest.raises(ModelError, match=r"'Qwen3NextForCausalLM'.*Qwen3ForCausalLM"):
        find_recipe(Config("qwen3_next", "Qwen3NextForCausalLM"))
    with pytest.raises(ModelError, match=r"model type 'gemma'.*Gemma2ForCausalLM"):
        find_recipe(Config("gemma"))
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        find_recipe(Config("llama", "LlamaForSequenceClassification"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; known here are silu"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types hold 'full_attention'"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_fact_that_is_not_implemented_is_refused(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotSupported, match=message):
        spec_of(name, **fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"num_key_value_heads": 4}, "6 attention heads do not divide over 4 KV heads"),
        ("llama", {"vocab_size": 0}, "vocab_size must be a whole number of at least 1, not 0"),
        ("qwen3-moe", {"num_experts_per_tok": 7}, "7 of 6 experts"),
        ("mixtral", {"num_experts_per_tok": 6}, "6 of 5 experts"),
    ],
)
def test_a_config_that_contradicts_itself_is_an_error(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(name, **fields)
