"""Filling parameters from checkpoints, and from nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.errors import WeightError
from vllm_core.models import find_recipe
from vllm_core.ops import HostArray, Param
from vllm_core.tests.models.families import config_of
from vllm_core.weights.loader import dummy_params, load_params
from vllm_core.weights.rules import WeightRules
from vllm_core.weights.source import CodeFormat

RUNTIME = NumpyRuntime("float32")


class MemorySource:
    """A WeightSource over arrays; its file is half as large as what it loads, as with GGUF."""

    def __init__(self, tensors: dict[str, HostArray]) -> None:
        self.tensors, self.loads = tensors, list[str]()

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype)

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values()) // 2

    def load(self, name: str) -> HostArray:
        self.loads.append(name)
        return self.tensors[name].copy()

    def codes(self, name: str) -> CodeFormat | None:
        return None

    def load_codes(self, name: str) -> dict[str, HostArray]:
        raise AssertionError(f"{name} is no codes")


def rules_of(name: str, **fields: Any) -> tuple[WeightRules, Any]:
    config = config_of(name, **fields)
    recipe = find_recipe(config)
    spec = recipe.spec(config, "float32")
    return recipe.weights(spec, config), spec


def source_of(rules: WeightRules, dtype: Any = np.float32) -> MemorySource:
    """A checkpoint with just the tensors that the rules name."""
    rng = np.random.default_rng(0)
    return MemorySource(
        {
            name: rng.standard_normal(tensor.shape).astype(dtype)
            for rule in rules.leaves()
            for part in rule.parts
            for tensor in part.tensors.values()
            for name in tensor.names
        }
    )


def test_every_tensor_is_read_once_and_fused_along_the_output_axis() -> None:
    rules, spec = rules_of("llama-biases-tied-llama3")
    source = source_of(rules)
    params = load_params(rules, source, RUNTIME, spec.layers)
    assert sorted(source.loads) == sorted(source.names())
    qkv = params["layers"][1]["qkv"]
    at = "model.layers.1.self_attn."
    for kind in ("weight", "bias"):
        want = [source.tensors[f"{at}{which}_proj.{kind}"] for which in "qkv"]
        assert (qkv[kind] == np.concatenate(want)).all()


def test_experts_are_stacked_with_gate_before_up() -> None:
    rules, spec = rules_of("mixtral")
    source = source_of(rules)
    layer = load_params(rules, source, RUNTIME, spec.layers)["layers"][0]
    at = "model.layers.0.block_sparse_moe.experts.3."
    gate, up = source.tensors[at + "w1.weight"], source.tensors[at + "w3.weight"]
    assert layer["gate_up"]["weight"].shape == (5, 80, 48)
    assert (layer["gate_up"]["weight"][3] == np.concatenate((gate, up))).all()
    assert (layer["down"]["weight"][3] == source.tensors[at + "w2.weight"]).all()


def test_gpt2s_matrices_are_transposed() -> None:
    rules, spec = rules_of("gpt2")
    source = source_of(rules)
    layer = load_params(rules, source, RUNTIME, spec.layers)["layers"][2]
    assert (layer["qkv"]["weight"] == source.tensors["transformer.h.2.attn.c_attn.weight"].T).all()


def test_a_tied_head_is_the_embedding_itself_and_a_stored_copy_is_ignored() -> None:
    rules, spec = rules_of("qwen2")
    source = source_of(rules)
    source.tensors["lm_head.weight"] = np.zeros((96, 48), np.float32)
    params = load_params(rules, source, RUNTIME, spec.layers)
    assert params["head"] is params["embed"]
    assert "lm_head.weight" not in source.loads


def test_an_untied_head_must_be_there() -> None:
    rules, spec = rules_of("llama")
    source = source_of(rules)
    del source.tensors["lm_head.weight"]
    with pytest.raises(WeightError, match=r"lacks 1 tensors .*'lm_head\.weight'"):
        load_params(rules, source, RUNTIME, spec.layers)


def test_gemmas_norms_gain_their_one_in_float32() -> None:
    rules, spec = rules_of("gemma3")
    source = source_of(rules)
    name = "model.layers.4.self_attn.q_norm.weight"
    source.tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in source.tensors.items()}
    source.tensors[name][:] = 0.00390625  # 1 + 2^-8 does not exist in bfloat16
    params = load_params(rules, source, RUNTIME, spec.layers)
    found = params["layers"][4]["q_norm"]["weight"]
    assert found.dtype == np.float32 and (found == 1.00390625).all()


def test_a_checkpoint_of_the_bare_model_and_its_buffers_are_accepted() -> None:
    rules, spec = rules_of("gpt2")
    source = source_of(rules)
    source.tensors = {k.removeprefix("transformer."): v for k, v in source.tensors.items()}
    source.tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    source.tensors["h.0.attn.masked_bias"] = np.ones((), np.float32)
    params = load_params(rules, source, RUNTIME, spec.layers)
    assert (params["positions"]["weight"] == source.tensors["wpe.weight"]).all()


def test_rotary_buffers_of_old_checkpoints_are_ignored() -> None:
    rules, spec = rules_of("llama")
    source = source_of(rules)
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load_params(rules, source, RUNTIME, spec.layers)


def test_a_missing_tensor_is_named_before_anything_is_read() -> None:
    rules, spec = rules_of("llama")
    source = source_of(rules)
    del source.tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(WeightError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight'"):
        load_params(rules, source, RUNTIME, spec.layers)
    assert source.loads == []


def test_an_unused_tensor_is_named() -> None:
    rules, spec = rules_of("llama")
    source = source_of(rules)
    source.tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(48, np.float32)
    with pytest.raises(WeightError, match=r"does not use: 'model\.layers\.0.*q_proj\.bias'"):
        load_params(rules, source, RUNTIME, spec.layers)


def test_a_tensor_of_another_shape_is_named_with_both_shapes() -> None:
    rules, spec = rules_of("llama")
    source = source_of(rules)
    source.tensors["model.norm.weight"] = np.ones(47, np.float32)
    with pytest.raises(WeightError, match=r"'model\.norm\.weight' has shape \[47\].*\[48\]"):
        load_params(rules, source, RUNTIME, spec.layers)


def test_a_quantised_tensor_is_refused() -> None:
    rules, spec = rules_of("llama")
    source = source_of(rules)
    name = "model.layers.0.mlp.up_proj.weight"
    source.tensors[name] = source.tensors[name].astype(np.int8)
    with pytest.raises(WeightError, match=r"up_proj\.weight' has dtype int8"):
        load_params(rules, source, RUNTIME, spec.layers)


def test_progress_adds_up_to_the_bytes_of_the_file() -> None:
    rules, spec = rules_of("mixtral")
    source = source_of(rules)
    told: list[int] = []
    load_params(rules, source, RUNTIME, spec.layers, told.append)
    assert sum(told) == source.num_bytes()
    assert len(told) > 20 and min(told) > 0


def flat(tree: Any) -> list[Param]:
    if isinstance(tree, Param):
        return [tree]
    return [
        leaf
        for child in (tree.values() if isinstance(tree, dict) else tree)
        for leaf in flat(child)
    ]


@pytest.mark.parametrize("name", ("llama-biases-tied-llama3", "gpt2", "qwen3-moe", "gemma2"))
def test_dummy_parameters_have_the_shapes_of_loaded_ones(name: str) -> None:
    rules, spec = rules_of(name)
    loaded = flat(load_params(rules, source_of(rules), RUNTIME, spec.layers))
    dummies = flat(dummy_params(rules, RUNTIME, spec.layers))
    assert [{k: v.shape for k, v in p.arrays.items()} for p in loaded] == [
        {k: v.shape for k, v in p.arrays.items()} for p in dummies
    ]
    distinct = {id(p): p for p in loaded}.values()
    assert rules.num_values() == sum(v.size for p in distinct for v in p.arrays.values())


def test_dummy_parameters_follow_the_seed_and_keep_activations_in_scale() -> None:
    rules, spec = rules_of("llama", hidden_size=240, intermediate_size=640)
    told: list[int] = []
    one, same, other = (
        dummy_params(rules, RUNTIME, spec.layers, seed, told.append) for seed in (1, 1, 2)
    )
    up, norm = one["layers"][0]["gate_up"]["weight"], one["layers"][0]["input_norm"]["weight"]
    assert (up == same["layers"][0]["gate_up"]["weight"]).all()
    assert (up != other["layers"][0]["gate_up"]["weight"]).all()
    assert not (up == one["layers"][1]["gate_up"]["weight"]).any()
    assert not (up[:640] == up[640:]).any()
    assert up.std() == pytest.approx(240**-0.5, rel=0.02)
    assert (norm == 1).all()
    assert sum(told) == 3 * 4 * rules.num_values()


def test_a_spec_with_other_sizes_asks_for_other_shapes() -> None:
    config = config_of("llama")
    recipe = find_recipe(config)
    spec = replace(recipe.spec(config, "float32"), vocab_size=97)
    source = source_of(rules_of("llama")[0])
    with pytest.raises(WeightError, match=r"\[96, 48\].*\[97, 48\]"):
        load_params(recipe.weights(spec, config), source, RUNTIME, spec.layers)
