"""What a model needs is held against what a backend declares, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_core.backend import KVFormat
from vllm_core.bindings.numpy import NumpyRuntime
from vllm_core.errors import NotSupported
from vllm_core.ops.sampling import MAX_VOCAB
from vllm_core.runner.worker import check_supported
from vllm_core.tests.engine.tiny import make_spec

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
        ({"kv": KVFormat("float32", scales=True)}, {}, "quantised or latent caches"),
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


def test_a_vocabulary_beyond_the_exact_sums_is_refused() -> None:
    with pytest.raises(NotSupported, match="exact up to"):
        check_supported(replace(SPEC, vocab_size=MAX_VOCAB + 1), NumpyRuntime())
