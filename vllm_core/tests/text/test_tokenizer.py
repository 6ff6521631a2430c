from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_core.errors import InvalidArgument, ModelError
from vllm_core.text.tokenizer import Tokenizer, load_tokenizer


def test_ids_are_those_of_the_wrapped_tokenizer(any_tokenizer, texts):
    for text in texts:
        for special in (True, False):
            assert any_tokenizer.encode(text, add_special_tokens=special) == (
                any_tokenizer.hf.encode(text, add_special_tokens=special)
            )


def test_decoding_undoes_encoding(byte_level, texts):
    for text in texts:
        assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_left_out_unless_asked_for(byte_level):
    ids = byte_level.encode("a<|turn|>b<think>")
    assert byte_level.decode(ids) == "ab<think>"
    assert byte_level.decode(ids, skip_special_tokens=False) == "a<|turn|>b<think>"


def test_special_ids_are_the_special_ones_of_the_added_tokens(byte_level):
    assert {byte_level.token_text(i) for i in byte_level.special_ids} == {"<|end|>", "<|turn|>"}


def test_vocabulary_counts_added_tokens(byte_level):
    assert byte_level.vocab_size == len(byte_level.hf)
    assert byte_level.token_text(byte_level.vocab_size - 1) == "two words"


def test_end_and_beginning_of_sequence_are_known(byte_level, sentencepiece):
    assert byte_level.eos_token_ids == (byte_level.encode("<|end|>")[0],)
    assert byte_level.bos_token_id is None
    assert (sentencepiece.bos_token_id, sentencepiece.eos_token_ids) == (1, (2,))


def test_text_of_one_token_keeps_its_leading_space(sentencepiece):
    token = sentencepiece.encode("the", add_special_tokens=False)
    assert [sentencepiece.token_text(i) for i in token] == [" the"]


def test_text_of_a_part_of_a_character_is_a_replacement(any_tokenizer):
    ids = any_tokenizer.encode("\U000e0041", add_special_tokens=False)
    assert b"".join(any_tokenizer.token_bytes(i) for i in ids).decode().strip() == "\U000e0041"
    assert "\ufffd" in any_tokenizer.token_text(ids[-1])


def test_texts_of_the_tokens_make_up_the_text(any_tokenizer, texts):
    for text in texts:
        ids = any_tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(any_tokenizer.token_bytes(i) for i in ids).decode("utf-8", "replace")
        decoded = any_tokenizer.decode(ids, skip_special_tokens=False)
        assert joined in (decoded, " " + decoded)


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**32 - 1, 2**32, 10**15])
def test_token_outside_the_vocabulary_has_no_text(any_tokenizer, token_id):
    assert any_tokenizer.token_text(token_id) == ""
    assert any_tokenizer.decode([token_id]) == ""


def test_every_token_has_a_text(any_tokenizer):
    stride = max(1, any_tokenizer.vocab_size // 5000)
    for token_id in range(0, any_tokenizer.vocab_size + 10, stride):
        assert isinstance(any_tokenizer.token_text(token_id), str)


def test_prompt_must_be_valid_unicode_text(byte_level):
    with pytest.raises(InvalidArgument, match="lone surrogate"):
        byte_level.encode("a\ud800")
    with pytest.raises(InvalidArgument, match="must be a string, not int"):
        byte_level.encode(7)


def test_truncation_recorded_in_the_file_never_cuts_a_prompt(byte_level, tmp_path):
    byte_level.hf.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(state))
    text = "the quick brown fox " * 5
    assert load_tokenizer(tmp_path).encode(text) == byte_level.encode(text)


def test_directory_without_tokenizer_says_what_is_expected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json .*--tokenizer"):
        load_tokenizer(tmp_path)


def test_path_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"directory or a \.gguf file"):
        load_tokenizer(file)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_file_is_one_clear_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_saved_tokenizer_loads_with_its_chat_template(byte_level, tmp_path, texts):
    byte_level.hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == "{{ messages[0]['content'] }}"
    assert [loaded.encode(t) for t in texts] == [byte_level.encode(t) for t in texts]


def test_tokenizer_file_alone_is_enough(byte_level, tmp_path):
    byte_level.hf.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("naïve 😀 fox") == byte_level.encode("naïve 😀 fox")
    assert (loaded.eos_token_ids, loaded.chat_template) == ((), None)


def test_vocabulary_and_merges_as_two_files_load_too(byte_level, tmp_path):
    byte_level.hf.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "The quick naïve 😀 fox"
    assert load_tokenizer(tmp_path).encode(text) == byte_level.encode(text)


def test_goldens_have_the_recorded_prompt_ids_and_texts(real, goldens):
    for name in ("stories15M", "stories260K"):
        tokenizer = real(name)
        for row in goldens(name):
            assert tokenizer.encode(row["prompt"]) == row["prompt_token_ids"]


def test_importing_the_room_imports_no_tokenizer_library():
    code = (
        "import sys, vllm_core.text.detokenizer, vllm_core.text.gguf_tokenizer, "
        "vllm_core.text.chat_template; "
        "sys.exit(bool({'transformers', 'tokenizers', 'jinja2', 'gguf'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_library_for_a_sentencepiece_model_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_sentencepiece_model_file_loads(tmp_path: Path):
    spm = pytest.importorskip("sentencepiece", reason="tokenizer.model files not checked")
    pytest.importorskip("google.protobuf", reason="tokenizer.model files not checked")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the dog ran\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    corpus.unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    processor = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer: Tokenizer = load_tokenizer(tmp_path)
    for text in ("the dog sat", "a 😀 cat"):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
