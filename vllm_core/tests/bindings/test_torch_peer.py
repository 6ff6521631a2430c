"""transformers' generate as the benchmark calls it."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_core.errors import ModelError

torch = pytest.importorskip("torch", reason="torch is missing: its side was not checked")
transformers = pytest.importorskip("transformers", reason="no peer: nothing was compared")

from vllm_core.bindings.torch.peer import Peer  # noqa: E402

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 5,
}


def make(**changes: Any) -> tuple[Any, Any]:
    """(config, a model with random weights)"""
    config = transformers.LlamaConfig(**CONFIG | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(0, 0.5)
    return config, model


def weights(model: Any) -> list[tuple[str, Any]]:
    return [(name, x.numpy().copy()) for name, x in model.state_dict().items()]


def test_padding_on_the_left_changes_no_token() -> None:
    config, model = make()
    peer = Peer(config, weights(model), "float32", threads=1)
    prompts, lengths = [[3, 9], [7, 8, 9, 10, 11, 12], [50]], [12, 3, 8]
    together = peer.generate(prompts, lengths, 3)
    assert together == peer.generate(prompts, lengths, 1)
    assert [len(answer) for answer in together] == lengths


def test_it_draws_the_most_likely_token_and_goes_on_behind_the_end() -> None:
    config, model = make()
    ids = [3, 9, 20]
    expected: list[int] = []
    with torch.inference_mode():
        for _ in range(40):
            expected.append(int(model(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    config.eos_token_id = expected[2]
    peer = Peer(config, weights(model), "float32", threads=1)
    assert peer.generate([ids], [40], 1) == [expected]


def test_tied_embeddings_need_no_head_of_their_own() -> None:
    config, model = make(tie_word_embeddings=True)
    tensors = [(name, x) for name, x in weights(model) if name != "lm_head.weight"]
    answers = Peer(config, tensors, "float32", threads=1).generate([[1, 2]], [4], 1)
    assert len(answers[0]) == 4


def test_weights_of_another_model_are_refused() -> None:
    config, model = make()
    with pytest.raises(ModelError, match=r"differ, first in 'lm_head\.weight'"):
        Peer(config, [w for w in weights(model) if w[0] != "lm_head.weight"], "float32", threads=1)
    with pytest.raises(ModelError, match="differ, first in 'other'"):
        Peer(config, [*weights(model), ("other", weights(model)[0][1])], "float32", threads=1)
