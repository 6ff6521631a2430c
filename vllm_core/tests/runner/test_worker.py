"""What a model needs is held against what a backend declares, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_core.backend import INT8_KV, KVFormat
from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.errors import NotSupported
from vllm_core.models.spec import kv_groups
from vllm_core.ops.sampling import MAX_VOCAB
from vllm_core.runner.worker import check_schemes, check_supported, kv_format
from vllm_core.tests.engine.tiny import make_spec
from vllm_core.tests.weights.test_loader import rules_of
from vllm_core.weights.rules import WeightRules

SPEC = make_spec("float32", (None,))


@pytest.mark.parametrize(
    ("attention", "caps", "what"),
    [
        ({"softcap": 30.0}, {"softcap": False}, "softcap"),
        ({"window": 8}, {"windows": False}, "sliding windows"),
        ({"sinks": True}, {"sinks": False}, "sinks"),
        ({"dim_qk": 256}, {"max_head_dim": 128}, "heads of 256"),
        ({"dim_qk": 7}, {}, "odd head sizes"),
        ({"chunk": 8}, {}, "chunked attention"),
        ({"alibi": True}, {}, "ALiBi"),
        ({"source": 0}, {}, "another layer's cache"),
        ({"writes_kv": False}, {}, "write no cache"),
        ({"kv": KVFormat("float32", scales=True)}, {}, "a KV cache of float32 with scales"),
        ({"kv": KVFormat("float32", v_in_k=True)}, {}, "a KV cache of float32 with V in K"),
        ({"kv": INT8_KV}, {}, "a KV cache of int8 with scales"),
        ({"kv": KVFormat("int8")}, {"kv_dtypes": {"int8"}}, "a KV cache of int8,"),
        ({"kv": KVFormat("bfloat16")}, {"kv_dtypes": {"int8"}}, "a KV cache of bfloat16"),
    ],
)
def test_what_the_backend_does_not_declare_is_refused_with_advice(
    attention: dict[str, Any], caps: dict[str, Any], what: str
) -> None:
    runtime = NumpyRuntime()
    check_supported(SPEC, runtime)
    runtime.caps = replace(runtime.caps, **caps)
    spec = replace(SPEC, attention_specs=(replace(SPEC.attention_specs[0], **attention),))
    with pytest.raises(NotSupported, match=f"needs .*{what}.*choose another backend"):
        check_supported(spec, runtime)


def test_a_declared_cache_of_8_bits_is_taken() -> None:
    runtime = NumpyRuntime()
    runtime.caps = replace(runtime.caps, kv_dtypes=frozenset({"int8"}))
    assert kv_format("auto", runtime) == KVFormat("float32")
    spec = SPEC.with_kv_format(kv_format("int8", runtime))
    check_supported(spec, runtime)
    assert {a.kv for a in spec.attention_specs} == {INT8_KV}
    assert all(layer.attention in spec.attention_specs for layer in spec.layers)
    assert {group.spec.kv for group in kv_groups(spec, 16)} == {INT8_KV}


def test_an_undeclared_kv_cache_dtype_is_refused_by_its_option() -> None:
    with pytest.raises(NotSupported, match=r"kv_cache_dtype int8 .* in float32: auto; leave it"):
        kv_format("int8", NumpyRuntime())


def test_a_kv_cache_dtype_that_another_dtype_may_have_is_refused_with_that_advice() -> None:
    with pytest.raises(NotSupported, match=r"in float64: auto; .* try another dtype"):
        kv_format("int8", NumpyRuntime("float64"))


@pytest.mark.parametrize(
    "kv", [KVFormat("int8"), KVFormat("float16"), KVFormat("int8", v_in_k=True)]
)
def test_a_format_that_a_cache_is_not_kept_in_is_refused_with_the_option(kv: KVFormat) -> None:
    known = "caches are of float32 or int8 with scales; use kv_cache_dtype auto"
    with pytest.raises(NotSupported, match=f"a KV cache of {kv}; .*{known}"):
        kv.refuse_unless("float32", frozenset({"int8"}))
    with pytest.raises(NotSupported, match="caches are of float32; use"):
        INT8_KV.refuse_unless("float32")


def test_a_vocabulary_beyond_the_exact_sums_is_refused() -> None:
    with pytest.raises(NotSupported, match="exact up to"):
        check_supported(replace(SPEC, vocab_size=MAX_VOCAB + 1), NumpyRuntime())


def quantised_rules(scheme: str, **sizes: int) -> WeightRules:
    return rules_of("llama", **sizes)[0].stored_as(scheme)


def test_a_scheme_that_the_backend_does_not_take_is_refused_with_advice() -> None:
    runtime = NumpyRuntime()
    rules = quantised_rules("int4", hidden_size=96, intermediate_size=64)
    check_schemes(rules, "int4", runtime)
    runtime.caps = replace(runtime.caps, schemes=frozenset({"dense", "int4"}))  # the head is int8
    with pytest.raises(NotSupported, match=r"as int4, int8, .* takes dense, int4;"):
        check_schemes(rules, "int4", runtime)


def test_a_model_with_nothing_to_quantise_is_refused() -> None:
    rules = quantised_rules("int8", hidden_size=48, intermediate_size=72)
    with pytest.raises(NotSupported, match="multiple of 32, and this model has none"):
        check_schemes(rules, "int8", NumpyRuntime())
    check_schemes(rules, None, NumpyRuntime())
