from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_core.errors import ModelError
from vllm_core.text.gguf_tokenizer import (
    PRE_TOKENIZERS,
    TokenType,
    merges_from_scores,
    read_tokenizer_metadata,
)
from vllm_core.text.tokenizer import Tokenizer, load_tokenizer
from vllm_core.weights.demo import demo_model_path

State = dict[str, Any]
"""What stands in a tokenizer.json."""

WriteGGUF = Callable[..., Path]


def state_of(tokenizer: Tokenizer) -> State:
    return json.loads(tokenizer.hf.backend_tokenizer.to_str())


def vocabulary(state: State) -> tuple[list[str], list[int]]:
    ids = dict(state["model"]["vocab"])
    types = {}
    for token in state["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    tokens = sorted(ids, key=ids.__getitem__)
    if state["model"]["byte_fallback"]:
        types |= {i: TokenType.BYTE for i, t in enumerate(tokens) if t.startswith("<0x")}
        types[0] = TokenType.UNKNOWN
    return tokens, [int(types.get(i, TokenType.NORMAL)) for i in range(len(tokens))]


def scores(state: State, tokens: list[str]) -> list[float]:
    """What sentencepiece's converter keeps: a token's score says when it is merged."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in state["model"]["merges"])
    ranks = {token: -float(i) for i, token in enumerate(dict.fromkeys(map("".join, pairs)))}
    return [ranks.get(token, 0.0) for token in tokens]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes the tokenizer of a tokenizer.json into a GGUF file, as llama.cpp's converter does."""
    import gguf

    def write(state: State, model: str, pre: str | None = None, **keys: Any) -> Path:
        tokens, types = vocabulary(state)
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model(model)
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        if model == "llama":
            writer.add_token_scores(scores(state, tokens))
            writer.add_unk_token_id(0)
        else:
            merges = state["model"]["merges"]
            writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
        for name, value in keys.items():
            getattr(writer, f"add_{name}")(value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def assert_same(got: Tokenizer, wanted: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = wanted.encode(text)
        assert got.encode(text) == ids
        assert got.decode(ids) == wanted.decode(ids)
    assert got.vocab_size == wanted.vocab_size
    assert got.special_ids == wanted.special_ids


def test_byte_level_bpe_gives_the_same_ids(write_gguf, byte_level, texts):
    path = write_gguf(state_of(byte_level), "gpt2", "gpt-2", eos_token_id=0)
    assert_same(load_tokenizer(path), byte_level, texts)
    assert load_tokenizer(path).eos_token_ids == byte_level.eos_token_ids


def test_sentencepiece_gives_the_same_ids(write_gguf, sentencepiece, texts):
    path = write_gguf(state_of(sentencepiece), "llama", bos_token_id=1, eos_token_id=2)
    assert_same(load_tokenizer(path), sentencepiece, texts)


@pytest.mark.parametrize(
    ("name", "pre"), [("gpt2", "gpt-2"), ("llama3.2", "llama-bpe"), ("qwen3", "qwen2")]
)
def test_real_byte_level_tokenizers_survive_the_trip(
    write_gguf, real, real_directory, texts, long_texts, name, pre
):
    state = json.loads((real_directory(name) / "tokenizer.json").read_text())
    bos = {"bos_token_id": 128000} if name == "llama3.2" else {}
    texts = [*texts, long_texts[0][:20_000], *long_texts[1:]]
    assert_same(load_tokenizer(write_gguf(state, "gpt2", pre, **bos)), real(name), texts)


@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_real_sentencepiece_tokenizers_survive_the_trip(
    write_gguf, real, real_directory, texts, long_texts, name
):
    state = json.loads((real_directory(name) / "tokenizer.json").read_text())
    texts = [*texts, long_texts[0][:20_000], *long_texts[1:]]
    assert_same(load_tokenizer(write_gguf(state, "llama", bos_token_id=1)), real(name), texts)


def test_demo_model_has_the_tokenizer_of_smollm2(real, texts, long_texts):
    path = demo_model_path()
    if path is None:
        pytest.skip("the demo model is not installed: its tokenizer was not checked")
    got, wanted = load_tokenizer(path), real("smollm2")
    assert_same(got, wanted, [*texts, *long_texts])
    assert got.eos_token_ids == wanted.eos_token_ids == (2,)
    assert got.bos_token_id == wanted.bos_token_id
    assert got.chat_template == wanted.chat_template


def test_smollm_splits_digits(write_gguf, byte_level):
    state = state_of(byte_level)
    state["model"]["merges"] += [["1", "2"]]
    state["model"]["vocab"]["12"] = 402
    together = load_tokenizer(write_gguf(state, "gpt2", "gpt-2"))
    alone = load_tokenizer(write_gguf(state, "gpt2", "smollm"))
    assert len(together.encode("12")) == 1
    assert len(alone.encode("12")) == 2


def test_default_pre_tokenizer_cuts_long_numbers_in_threes(write_gguf, byte_level):
    tokenizer = load_tokenizer(write_gguf(state_of(byte_level), "gpt2", "default"))
    pieces = tokenizer.hf.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a $12345")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "$", "123", "45"]


def test_file_that_names_no_pre_tokenizer_gets_the_default_with_a_warning(
    write_gguf, byte_level, caplog
):
    tokenizer = load_tokenizer(write_gguf(state_of(byte_level), "gpt2"))
    assert "names no pre-tokenizer" in caplog.text
    assert tokenizer.decode(tokenizer.encode("It's 12345 €")) == "It's 12345 €"


def test_unknown_pre_tokenizer_names_the_known_ones(write_gguf, byte_level):
    path = write_gguf(state_of(byte_level), "gpt2", "klingon")
    with pytest.raises(
        ModelError, match=r"'klingon'.*known are .*llama-bpe.*--tokenizer"
    ) as caught:
        load_tokenizer(path)
    assert all(name in str(caught.value) for name in PRE_TOKENIZERS)


def test_unknown_tokenizer_model_is_refused(write_gguf, byte_level):
    with pytest.raises(ModelError, match=r"'rwkv' is not known; known are 'gpt2' and 'llama'"):
        load_tokenizer(write_gguf(state_of(byte_level), "rwkv"))


def test_merges_without_their_tokens_are_refused(write_gguf, byte_level):
    state = state_of(byte_level)
    state["model"]["merges"] += [["no", "where"]]
    with pytest.raises(ModelError, match="cannot be built"):
        load_tokenizer(write_gguf(state, "gpt2", "gpt-2"))


def test_special_id_outside_the_vocabulary_is_refused(write_gguf, byte_level):
    with pytest.raises(ModelError, match=r"eos_token_id is 5000, but the file has \d+ tokens"):
        load_tokenizer(write_gguf(state_of(byte_level), "gpt2", "gpt-2", eos_token_id=5000))


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
def test_sequence_is_surrounded_as_the_file_says(write_gguf, sentencepiece, add_bos, add_eos):
    keys = {"bos_token_id": 1, "eos_token_id": 2}
    keys |= {"add_bos_token": add_bos} if add_bos is not None else {}
    keys |= {"add_eos_token": add_eos} if add_eos is not None else {}
    ids = load_tokenizer(write_gguf(state_of(sentencepiece), "llama", **keys)).encode("the")
    bos = [1] if add_bos is not False else []  # sentencepiece's default
    assert ids == [
        *bos,
        *sentencepiece.encode("the", add_special_tokens=False),
        *[2] * bool(add_eos),
    ]


def test_space_prefix_is_left_out_where_the_file_says_so(write_gguf, sentencepiece):
    path = write_gguf(state_of(sentencepiece), "llama", add_space_prefix=False, bos_token_id=1)
    tokenizer = load_tokenizer(path)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("and the")] == ["<s>", "and", " the"]
    assert tokenizer.decode(tokenizer.encode(" and")) == " and"


def test_end_of_turn_ends_a_sequence_too(write_gguf, byte_level):
    state = state_of(byte_level)
    named = load_tokenizer(write_gguf(state, "gpt2", "gpt-2", eos_token_id=0, eot_token_id=1))
    assert named.eos_token_ids == (0, 1)
    by_name = load_tokenizer(write_gguf(state, "gpt2", "gpt-2", eos_token_id=1))
    assert by_name.eos_token_ids == (1, 0)  # <|end|> is known


def test_chat_template_is_read(write_gguf, byte_level):
    path = write_gguf(state_of(byte_level), "gpt2", "gpt-2", chat_template="{{ messages }}")
    assert load_tokenizer(path).chat_template == "{{ messages }}"
    assert load_tokenizer(write_gguf(state_of(byte_level), "gpt2", "gpt-2")).chat_template is None


def test_metadata_is_what_the_gguf_library_reads(write_gguf, sentencepiece):
    import gguf

    path = write_gguf(state_of(sentencepiece), "llama", add_bos_token=True, chat_template="ä")
    fields = gguf.GGUFReader(path).fields
    wanted = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    assert read_tokenizer_metadata(path) == wanted


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="truncated or damaged"):
        load_tokenizer(path)


def test_file_without_tokenizer_says_so(tmp_path):
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"holds no tokenizer.*--tokenizer"):
        load_tokenizer(path)


def test_damaged_metadata_is_never_anything_but_a_model_error(write_gguf, sentencepiece):
    path = write_gguf(state_of(sentencepiece), "llama", bos_token_id=1)
    whole = path.read_bytes()
    damaged = path.with_name("damaged.gguf")
    for size in range(0, len(whole) - 64, 499):
        damaged.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            load_tokenizer(damaged)
    for at in range(8, 400, 3):
        damaged.write_bytes(whole[:at] + b"\xff\xff\xff" + whole[at + 3 :])
        with contextlib.suppress(ModelError):
            load_tokenizer(damaged)


def test_merges_are_ordered_by_score_and_join_normal_tokens_only():
    tokens = ["<s>", "a", "b", "ab", "abb", "bb", "<0x61>", "ba"]
    types = [3, 1, 1, 1, 1, 1, 6, 4]
    merges = merges_from_scores(tokens, types, [0, 0, 0, -3, -1, -2, 0, 0])
    assert merges == [("a", "bb"), ("ab", "b"), ("b", "b"), ("a", "b")]
