"""Tokenizers for the tests of the room: two tiny ones made here, real ones from the test data."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_core import envs
from vllm_core.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789 It's what we'll do, isn't it?",
    "naïve café — “quotes” … 你好，世界 😀 🏳️‍🌈 Ελλάδα\n\n\tdef f(x):\n        return x**2",
] * 3

REAL = {
    "gpt2": "tokenizers/gpt2",
    "llama3.2": "tokenizers/llama3.2",
    "qwen3": "tokenizers/qwen3",
    "smollm2": "models/smollm2-135m-instruct",
    "stories15M": "models/stories15M",
    "stories260K": "models/stories260K",
}
"""Every tokenizer of the test data, below its root."""


def make_byte_level() -> Tokenizer:
    """Byte-level BPE as GPT-2's, with special and plain added tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>"), AddedToken("two words")])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>"))


def make_sentencepiece() -> Tokenizer:
    """Sentencepiece-like BPE as Llama 2's: "▁" for spaces, single bytes for unknown characters."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "n"), ("an", "d"), ("▁", "and")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    tokens += [*"abcdefghijklmnopqrstuvwxyz.,é", *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:3]])
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return make_byte_level()


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return make_sentencepiece()


@pytest.fixture(scope="session")
def data() -> Path:
    root = envs.test_data()
    if root is None:
        pytest.skip("VLLM_CORE_TEST_DATA is not set: real tokenizers and goldens not checked")
    return root


@pytest.fixture(scope="session")
def real_directory(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a real tokenizer by name, unpacked."""
    found: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name not in found:
            folder = found[name] = tmp_path_factory.mktemp(name)
            for source in (data / REAL[name]).glob("tokenizer*"):
                if source.suffix == ".gz":
                    (folder / source.stem).write_bytes(gzip.decompress(source.read_bytes()))
                else:
                    shutil.copy(source, folder)
        return found[name]

    return unpack


@pytest.fixture(scope="session")
def real(real_directory: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """A real tokenizer by name."""
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = load_tokenizer(real_directory(name))
        return loaded[name]

    return load


@pytest.fixture(params=["byte level", "sentencepiece", *REAL])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the tiny and the real tokenizers."""
    if request.param in REAL:
        return request.getfixturevalue("real")(request.param)
    return request.getfixturevalue(request.param.replace(" ", "_"))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Text that tokenizers are known to get wrong."""
    return [
        *CORPUS[:2],
        "",
        "a",
        " leading and trailing  ",
        "12345 6,789.01 x1y22 ½ Ⅷ ٣٤٥ ①②",
        "e\u0301 é \u200b\u00a0x\r\n\r\n\t  \n a  b   c\n\n\n",
        "it's I'LL we'Ve 'd",
        "<|im_start|>user\nhi<|im_end|> <repo_name>x<s>y</s> <tool_call>",
        "\x00\x01 \ufffd \U0010ffff",
        "👩‍👩‍👧‍👦 مرحبا नमस्ते 한국어",
    ]


@pytest.fixture(scope="session")
def long_texts(data: Path) -> list[str]:
    """Plays and questions."""
    plays = gzip.decompress((data / "prompts/tinyshakespeare/input.txt.gz").read_bytes()).decode()
    lines = (data / "prompts/mt-bench/question.jsonl").read_text().splitlines()
    return [plays, *(turn for line in lines for turn in json.loads(line)["turns"])]


@pytest.fixture(scope="session")
def goldens(data: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Recorded prompts and answers of a model, by folder."""

    def read(folder: str) -> list[dict[str, Any]]:
        lines = (data / "models" / folder / "golden.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read
