"""Turns text into token ids and ids into text.

Knows: tokenizer files, special tokens, the text of one token. Does not know: models, streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_core.errors import InvalidArgument, ModelError

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
"""A directory with none of these has no tokenizer."""

MAX_TOKEN_ID = 2**32 - 1
"""The library under us counts token ids in 32 bits."""


class Tokenizer:
    """A `transformers` fast tokenizer with the few questions that an engine asks.

    Encoding and decoding go to the library below transformers directly: that neither mutates it
    (so threads may share it) nor "cleans up" spaces in what a model wrote.
    """

    def __init__(
        self, hf: PreTrainedTokenizerFast, *, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        backend = hf.backend_tokenizer
        # A tokenizer.json may carry some training run's truncation; no prompt is cut silently.
        backend.no_truncation()
        backend.no_padding()
        self.hf = hf
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id: int | None = hf.bos_token_id
        own_eos = () if hf.eos_token_id is None else (hf.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = (
            own_eos if eos_token_ids is None else tuple(eos_token_ids)
        )
        self.special_ids: frozenset[int] = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._backend = backend
        decoders = _decoder_types(backend.decoder)
        self.is_byte_level: bool = decoders == ["ByteLevel"]
        """Whether tokens are strings of bytes, and the text their UTF-8; else tokens are text."""
        if "ByteLevel" in decoders and not self.is_byte_level:
            raise ModelError(
                f"the tokenizer decodes by {' + '.join(decoders)}; ByteLevel is known alone only"
            )
        self.fallback_bytes: dict[int, int] = (
            _fallback_bytes(backend.token_to_id) if "ByteFallback" in decoders else {}
        )
        """Ids that stand for one byte of a character that has no token of its own."""
        self._alphabet = _byte_alphabet() if self.is_byte_level else {}
        self._anchor = self._choose_anchor()
        self._token_bytes: dict[int, bytes] = {}

    @property
    def chat_template(self) -> str | None:
        """The model's chat template in Jinja; of several named ones the default."""
        template = self.hf.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template or None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens: what the tokenizer itself puts around a sequence."""
        if not isinstance(text, str):
            raise InvalidArgument(f"a prompt must be a string, not {type(text).__name__}")
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise InvalidArgument(
                "the text is not valid Unicode: it holds a lone surrogate"
            ) from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a sequence; ids outside the vocabulary have none."""
        known = [i for i in ids if 0 <= i <= MAX_TOKEN_ID]
        text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as it reads inside a text, also a special one; "" outside the vocabulary."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text that precedes it, which may be a part of a character."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._find_bytes(token_id)
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id <= MAX_TOKEN_ID else None
        if token is None:
            return b""
        if token_id in self.fallback_bytes:
            return bytes([self.fallback_bytes[token_id]])
        if self.is_byte_level:
            if all(c in self._alphabet for c in token):
                return bytes(self._alphabet[c] for c in token)
            return token.encode()
        # A decoder may treat the first token of a text in its own way, so ask behind another one.
        before = self.decode(self._anchor, skip_special_tokens=False)
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(before).encode()

    def _choose_anchor(self) -> list[int]:
        """A token with visible text, behind which no rule for the start of a text applies."""
        candidates = self.encode("a", add_special_tokens=False)
        shown = [i for i in candidates if i not in self.fallback_bytes and self.decode([i]).strip()]
        return shown[-1:]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory or of a GGUF file; nothing is downloaded.

    Raises ModelError when there is none, or none that can be read.
    """
    if path.is_file() and path.suffix.lower() == ".gguf":
        from vllm_core.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    if not path.is_dir():
        came = "is a file of another kind" if path.exists() else "does not exist"
        raise ModelError(f"a tokenizer is read from a directory or a .gguf file, but {path} {came}")
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{path} holds no tokenizer: tokenizer.json (or tokenizer.model) is expected there; "
            "put it there or name another directory, .gguf file or hub id with --tokenizer"
        )
    return Tokenizer(_load_directory(path))


def _load_directory(path: Path) -> PreTrainedTokenizerFast:
    is_complete = (path / "tokenizer.json").exists()
    missing = [] if is_complete else _missing_for_sentencepiece(path)
    if missing:
        raise ModelError(
            f"reading {path / 'tokenizer.model'} needs more libraries: pip install "
            f"{' '.join(missing)}; or name a tokenizer with a tokenizer.json with --tokenizer"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is complete, while a model's own class may rebuild parts of it from defaults.
    chosen = PreTrainedTokenizerFast if is_complete else AutoTokenizer
    try:
        hf = chosen.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library below raises bare Exception for a broken file
        raise ModelError(f"the tokenizer in {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(hf, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer in {path} is a {type(hf).__name__}, which has no fast form; "
            "convert it to a tokenizer.json or name another one with --tokenizer"
        )
    return hf


def _missing_for_sentencepiece(path: Path) -> list[str]:
    """Packages that transformers wants for a tokenizer.model and that are not installed."""
    if not (path / "tokenizer.model").exists():
        return []
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    return [package for package, module in modules.items() if not _is_importable(module)]


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _decoder_types(decoder: Decoder | None) -> list[str]:
    """Names of the steps of a decoder, which it tells only through its pickled form, JSON."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]


def _fallback_bytes(token_to_id: Callable[[str], int | None]) -> dict[int, int]:
    found = {}
    for byte in range(256):
        token_id = token_to_id(f"<0x{byte:02X}>")
        if token_id is not None:
            found[token_id] = byte
    return found


def _byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return {char: byte for byte, char in characters.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
