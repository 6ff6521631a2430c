"""Which parameters become or stay codes, what the runtime is handed, and how many bytes that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest

from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.bindings.parts import stored_parts
from vllm_core.config import Quantization
from vllm_core.ops import Param, ParamSpec, Part, quantized
from vllm_core.tests.weights.checkpoints import LLAMA, convert, write_gguf
from vllm_core.tests.weights.test_gguf import dense
from vllm_core.tests.weights.test_loader import rules_of, source_of
from vllm_core.weights.gguf import GGUFFile
from vllm_core.weights.loader import dummy_params, load_params
from vllm_core.weights.rules import WeightRules, join_name, split_name
from vllm_core.weights.source import CodeFormat
from vllm_core.weights.stored import kept_codes, param_bytes, scheme_names

Q = gguf.GGMLQuantizationType
NATIVE = frozenset(quantized.BITS)


class Keeps(NumpyRuntime):
    """Notes in which schemes parts come, and are stored."""

    def __init__(self) -> None:
        super().__init__("float32")
        self.caps = replace(self.caps, native_schemes=NATIVE)
        self.given: dict[str, list[str]] = {}
        self.stored: dict[str, list[str]] = {}
        self.groups: dict[str, int] = {}
        self.num_bytes = 0

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        self.given[spec.name] = [part.scheme for part in parts]
        stored = list(stored_parts(spec, parts))
        self.stored[spec.name] = [part.scheme for part in stored]
        for part in stored:
            if "codes" in part.tensors:
                self.groups[spec.name] = spec.shape[-1] // part.tensors["scales"].shape[1]
            for name, x in part.tensors.items():
                bits = quantized.BITS.get(part.scheme, 8) if name == "codes" else 32
                self.num_bytes += x.size * bits // 8
        return super().load(spec, [Part(*part) for part in stored])


def schemes(rules: WeightRules) -> dict[str, str]:
    return {rule.spec.name: rule.spec.scheme for rule in rules.leaves()}


@pytest.mark.parametrize("scheme", quantized.BITS)
def test_linear_layers_are_quantised_and_the_head_to_8_bits_at_least(scheme: str) -> None:
    rules, _ = rules_of("llama", hidden_size=96, intermediate_size=96)
    found = schemes(rules.stored_as(scheme))
    wide = scheme.replace("int4", "int8")
    assert found["embed"] == found["head"] == wide
    assert {found[f"layers.1.{name}"] for name in ("qkv", "output", "gate_up", "down")} == {scheme}
    assert found["norm"] == found["layers.0.input_norm"] == "dense"
    assert set(schemes(rules).values()) == {"dense"}  # the rules themselves are as they were


def test_a_tied_head_stays_one_parameter() -> None:
    rules, spec = rules_of("qwen2", hidden_size=96, intermediate_size=64)
    rules = rules.stored_as("int4")
    assert rules.params["head"] is rules.params["embed"]
    params = load_params(rules, source_of(rules), Keeps(), spec.layers)
    assert params["head"] is params["embed"]


def test_routers_experts_and_positions_stay_dense() -> None:
    rules, _ = rules_of("mixtral", hidden_size=96, intermediate_size=64)
    found = schemes(rules.stored_as("int8"))
    assert {found[f"layers.0.{n}"] for n in ("router", "gate_up", "down")} == {"dense"}
    assert found["layers.0.qkv"] == "int8"
    rules, _ = rules_of("gpt2", n_embd=96)
    found = schemes(rules.stored_as("int8"))
    assert (found["positions"], found["embed"], found["layers.0.up"]) == ("dense", "int8", "int8")


def test_what_no_group_divides_stays_dense() -> None:
    rules, spec = rules_of("llama", hidden_size=96, intermediate_size=72)
    found = schemes(rules.stored_as("int4"))
    assert (found["layers.0.gate_up"], found["layers.0.down"]) == ("int4", "dense")
    runtime = Keeps()
    dummy_params(rules.stored_as("int4"), runtime, spec.layers)
    assert set(runtime.given["layers.0.qkv"]) == {"dense"}  # quantised by the runtime
    assert runtime.stored["layers.0.qkv"] == ["int4"] * 3
    assert runtime.stored["layers.0.down"] == ["dense"]


@pytest.mark.parametrize(
    ("quantization", "groups"),
    [
        ("int4", (64, 64, 64)),
        ("int4-g32", (32, 32, 64)),
        ("int4-g64-weight-only", (64, 64, 64)),
        ("int4-g128", (64, 128, 64)),
        ("int8", (64, 128, 64)),
    ],
)
def test_the_group_that_is_asked_for_is_the_largest_that_is_used(
    quantization: str, groups: tuple[int, ...]
) -> None:
    rules, spec = rules_of("llama", hidden_size=192, intermediate_size=256)
    rules, runtime = rules.stored_as(quantization), Keeps()
    dummy_params(rules, runtime, spec.layers)
    found = tuple(runtime.groups[name] for name in ("layers.0.qkv", "layers.1.down", "embed"))
    assert found == groups
    assert param_bytes(rules, {}, NATIVE, 4) == runtime.num_bytes


@pytest.mark.parametrize(
    ("name", "scheme", "largest", "joined"),
    [
        ("int4-g32", "int4", 32, "int4-g32"),
        ("int4-g128-weight-only", "int4-weight-only", 128, "int4-g128-weight-only"),
        ("int4-weight-only", "int4-weight-only", None, "int4-g64-weight-only"),
        ("int8-weight-only", "int8-weight-only", None, "int8-weight-only"),
        ("dense", "dense", None, "dense"),
    ],
)
def test_a_name_is_a_scheme_and_perhaps_a_group(
    name: str, scheme: str, largest: int | None, joined: str
) -> None:
    assert split_name(name) == (scheme, largest)
    assert join_name(scheme, largest or 64) == joined


@pytest.mark.parametrize("name", get_args(Quantization))
def test_every_name_that_a_user_may_give_quantises(name: str) -> None:
    rules, _ = rules_of("llama", hidden_size=192, intermediate_size=128)
    found = set(schemes(rules.stored_as(name)).values()) - {"dense"}
    assert found <= NATIVE and bool(found) == (name != "dense")


def names_of(quantization: str, name: str = "llama", **sizes: int) -> str:
    rules, _ = rules_of(name, **({"hidden_size": 192, "intermediate_size": 256} | sizes))
    return scheme_names(rules.stored_as(quantization), {}, NATIVE, "float32")


def test_how_weights_are_stored_is_told_in_names_that_may_be_asked_for() -> None:
    assert names_of("dense") == "dense" and names_of("int8-weight-only") == "int8-weight-only"
    assert names_of("int4-g32") == "int4-g32 + int8"
    assert names_of("int4-g128", vocab_size=32) == "int4-g64 + int4-g128 + int8"
    assert names_of("int8", intermediate_size=72) == "int8 + dense"
    assert names_of("int8", name="mixtral").startswith("dense + int8")
    rules, _ = rules_of("llama", hidden_size=96, intermediate_size=64)
    found = scheme_names(rules.stored_as("int8"), {}, frozenset(), "bfloat16")
    assert found == "int8 as bfloat16 numbers"


@pytest.mark.parametrize("scheme", ["dense", "int8", "int4-weight-only"])
@pytest.mark.parametrize("name", ["llama-biases-tied-llama3", "mixtral", "gpt2"])
def test_bytes_are_those_of_what_is_stored(name: str, scheme: str) -> None:
    sizes = {"n_embd": 96} if name == "gpt2" else {"hidden_size": 96, "intermediate_size": 128}
    rules, spec = rules_of(name, **sizes)
    rules, runtime = rules.stored_as(scheme), Keeps()
    dummy_params(rules, runtime, spec.layers)
    assert param_bytes(rules, {}, NATIVE, 4) == runtime.num_bytes
    assert param_bytes(rules, {}, frozenset(), 4) == 4 * rules.num_values()
    assert (runtime.num_bytes < 4 * rules.num_values()) == (scheme != "dense")


MIX = {"attn_v": Q.Q8_0, "ffn_down": Q.Q8_0, "token_embd": Q.Q8_0, "attn_output": Q.Q4_0}


def open_mix(folder: Path, **more: Any) -> tuple[GGUFFile, WeightRules, Any]:
    """A file whose types differ from part to part, as in Q4_K_M."""
    rules, spec = rules_of(
        "llama", hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=2, head_dim=8, vocab_size=48, tie_word_embeddings=True,
    )  # fmt: skip
    converted = convert("llama", dense())
    kinds = {
        name: next((kind for stem, kind in (more | MIX).items() if stem in name), Q.Q4_1)
        for name, array in converted.items()
        if array.ndim > 1
    }
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    return GGUFFile(write_gguf(folder / "m.gguf", "llama", LLAMA, converted, kinds)), rules, spec


def test_codes_of_a_file_stay_codes_where_the_runtime_multiplies_them(tmp_path: Path) -> None:
    file, rules, spec = open_mix(tmp_path)
    kept, runtime, told = kept_codes(rules, file, NATIVE, weight_only=False), Keeps(), list[int]()
    params = load_params(rules, file, runtime, spec.layers, told.append, kept)
    assert runtime.given["layers.0.qkv"] == ["int4", "int4", "int8"]
    assert runtime.given["layers.1.gate_up"] == ["int4", "int4"]
    assert runtime.given["embed"] == ["int8"] and runtime.given["norm"] == ["dense"]
    assert kept["layers.0.output"] == (CodeFormat("int4", 32),)
    assert param_bytes(rules, kept, NATIVE, 4) == runtime.num_bytes
    assert scheme_names(rules, kept, NATIVE, "float32") == "int4-g32 + int8 as in the file"
    assert sum(told) == file.num_bytes()
    plain = load_params(rules, file, NumpyRuntime("float32"), spec.layers)
    for name in ("qkv", "output", "gate_up", "down"):
        assert np.array_equal(
            params["layers"][1][name]["weight"], plain["layers"][1][name]["weight"]
        )


def test_a_parameter_with_one_part_that_cannot_stay_codes_is_read_dense(tmp_path: Path) -> None:
    file, rules, _ = open_mix(tmp_path, attn_k=None, ffn_up=None)
    kept = kept_codes(rules, file, NATIVE, weight_only=False)
    assert "layers.0.qkv" not in kept and "layers.0.gate_up" not in kept
    found = scheme_names(rules, kept, NATIVE, "float32")
    assert found == "int8 + int4-g32 as in the file + dense"  # the rest was codes there too
    assert {"layers.0.output", "layers.0.down", "embed"} < set(kept)


def test_only_schemes_that_the_runtime_multiplies_are_kept(tmp_path: Path) -> None:
    file, rules, _ = open_mix(tmp_path)
    assert set(kept_codes(rules, file, {"int8"}, weight_only=False)) == {
        "embed",
        "layers.0.down",
        "layers.1.down",
    }
    assert kept_codes(rules, file, frozenset(), weight_only=False) == {}
    assert kept_codes(rules.stored_as("int4"), file, NATIVE, weight_only=False) == {}


def test_a_wide_model_keeps_its_inputs_as_they_are(tmp_path: Path) -> None:
    file, rules, _ = open_mix(tmp_path)
    kept = kept_codes(rules, file, NATIVE, weight_only=True)
    assert kept["layers.0.output"] == (CodeFormat("int4-weight-only", 32),)
    assert not kept_codes(rules, file, {"int4", "int8"}, weight_only=True)
