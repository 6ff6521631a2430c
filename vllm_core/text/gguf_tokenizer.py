"""Builds a tokenizer from the metadata of a GGUF file.

Knows: GGUF's key names, pre-tokenizers by name, sentencepiece merges. Does not know: weights.

transformers can do this too, but where it does not know the name of a pre-tokenizer it takes
GPT-2's without a word: SmolLM2 then reads "12" as one token. Here an unknown name is refused.
Semantics follow llama.cpp, the reference for GGUF, and the model's own tokenizer.json where the
two differ.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_core.errors import ModelError
from vllm_core.log import get_logger
from vllm_core.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

logger = get_logger(__name__)

Scalar = int | float | bool | str
Metadata = Mapping[str, Scalar | list[Scalar]]


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-pair merging."""

    splits: tuple[str, ...] = ()
    """Regular expressions, each applied to the pieces that the one before left; none: GPT-2's."""
    digits_alone: bool = False
    normalize_nfc: bool = False
    ignore_merges: bool = False
    """A piece that is a token as a whole is taken so, whatever the merges say."""
    add_bos: bool = False
    """Whether a file that does not say wants the beginning-of-sequence token."""


_LLAMA3 = PreTokenizer(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    ignore_merges=True,
    add_bos=True,
)
_SMOLLM = PreTokenizer(digits_alone=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
    "gpt-2": PreTokenizer(),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenizer(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        normalize_nfc=True,
    ),
}
"""By `tokenizer.ggml.pre`."""

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end a turn of chat; older files name only the end of a text."""

_KEY = "tokenizer.ggml."


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file; ModelError when there is none, or none that is known."""
    meta = read_tokenizer_metadata(path)
    try:
        return _build(meta)
    except ModelError as error:
        raise ModelError(f"{path}: {error}; name another tokenizer with --tokenizer") from error
    except Exception as error:  # the library below raises bare Exception for merges without tokens
        raise ModelError(f"{path}: its tokenizer cannot be built: {error}") from error


def _build(meta: Metadata) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    vocab = _Vocabulary.read(meta)
    kind = meta.get(_KEY + "model")
    if kind == "gpt2":
        pre = _pre_tokenizer(meta)
        backend = _byte_pair(vocab, meta, pre)
        add_bos = pre.add_bos
    elif kind == "llama":
        backend = _sentencepiece(vocab, meta)
        add_bos = True
    else:
        raise ModelError(f"the tokenizer model {kind!r} is not known; known are 'gpt2' and 'llama'")
    _add_tokens(backend, vocab)
    names = {
        "bos_token": vocab.named(meta, "bos"),
        "eos_token": vocab.named(meta, "eos"),
        "unk_token": vocab.named(meta, "unknown"),
        "pad_token": vocab.named(meta, "padding"),
    }
    _surround(
        backend,
        bos=names["bos_token"] if meta.get(_KEY + "add_bos_token", add_bos) else None,
        eos=names["eos_token"] if meta.get(_KEY + "add_eos_token", False) else None,
    )
    hf = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        hf.chat_template = template
    return Tokenizer(hf, eos_token_ids=_end_ids(vocab, meta))


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, meta: Metadata) -> _Vocabulary:
        tokens = _strings(meta, "tokens")
        types = meta.get(_KEY + "token_type") or [TokenType.NORMAL] * len(tokens)
        if not isinstance(types, list) or len(types) != len(tokens):
            raise ModelError("token_type must hold one number per token")
        return cls(tokens, [int(t) for t in types])

    def of_type(self, *wanted: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types) if kind in wanted]

    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def named(self, meta: Metadata, role: str) -> str | None:
        """The token that `<role>_token_id` names."""
        token_id = meta.get(f"{_KEY}{role}_token_id")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise ModelError(
                f"{role}_token_id is {token_id}, but the file has {len(self.tokens)} tokens"
            )
        return self.tokens[token_id]


def _strings(meta: Metadata, name: str) -> list[str]:
    values = meta.get(_KEY + name)
    if not isinstance(values, list) or not values:
        raise ModelError(f"the file holds no tokenizer: {_KEY}{name} is missing")
    return [str(v) for v in values]


def _pre_tokenizer(meta: Metadata) -> PreTokenizer:
    name = meta.get(_KEY + "pre")
    if name is None:
        logger.warning(
            "the GGUF file names no pre-tokenizer; taking the default one, which may be wrong"
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelError(f"the pre-tokenizer {name!r} is not known; known are {known}")
    return PRE_TOKENIZERS[str(name)]


def _byte_pair(vocab: _Vocabulary, meta: Metadata, pre: PreTokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2's, with the merges that the file lists."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in _strings(meta, "merges"))
    ]
    backend = Tokenizer(
        models.BPE(vocab=vocab.ids(), merges=merges, ignore_merges=pre.ignore_merges)
    )
    if pre.normalize_nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.digits_alone:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.splits))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocab: _Vocabulary, meta: Metadata) -> tokenizers.Tokenizer:
    """Sentencepiece BPE: a space is "▁", an unknown character its bytes, scores give the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = meta.get(_KEY + "scores")
    if not isinstance(scores, list) or len(scores) != len(vocab.tokens):
        raise ModelError("scores must hold one number per token")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab.ids(),
            merges=merges_from_scores(vocab.tokens, vocab.types, [float(s) for s in scores]),
            unk_token=vocab.named(meta, "unknown")
            or next(iter(vocab.of_type(TokenType.UNKNOWN)), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    texts: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if meta.get(_KEY + "add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
        texts.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(texts)
    return backend


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score first, as sentencepiece joins them.

    Only normal tokens take part: text never joins into a control, byte or user-defined token.
    """
    ids = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind == TokenType.NORMAL}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _add_tokens(backend: tokenizers.Tokenizer, vocab: _Vocabulary) -> None:
    """Control and user-defined tokens are matched whole, before anything else sees the text."""
    from tokenizers import AddedToken

    special = vocab.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    own = vocab.of_type(TokenType.USER_DEFINED)
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in own])


def _surround(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    from tokenizers import processors

    around = [token for token in (bos, eos) if token is not None]
    if around:
        backend.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
        )


def _end_ids(vocab: _Vocabulary, meta: Metadata) -> list[int]:
    """Ids that end a sequence: the file's end of sequence, turn and message, else turns by name."""
    ids = vocab.ids()
    ends = [vocab.named(meta, role) for role in ("eos", "eot", "eom")]
    if ends[1] is None:
        control = set(vocab.of_type(TokenType.CONTROL))
        ends += [token for token in END_OF_TURN if token in control]
    return [ids[token] for token in dict.fromkeys(ends) if token is not None]


_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def read_tokenizer_metadata(path: Path) -> Metadata:
    """The metadata of a GGUF file whose keys begin with "tokenizer.".

    Not by the `gguf` library: it makes an array per token and takes 1.6 s for 49,152 tokens and
    their merges, where this takes a twentieth.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file")
            reader = _Reader(data, 4)
            version, _, count = reader.unpack("I"), reader.unpack("Q"), reader.unpack("Q")
            if version not in (2, 3):
                raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 are known")
            pairs = [
                (reader.string(), reader.value(int(reader.unpack("I")))) for _ in range(int(count))
            ]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path}: its GGUF metadata is truncated or damaged ({error})") from error
    return {key: value for key, value in pairs if key.startswith("tokenizer.")}


class _Reader:
    """Reads little-endian values one behind the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self._position = position

    def unpack(self, code: str) -> Scalar:
        return self._numbers(code, 1)[0]

    def string(self) -> str:
        length = int(self.unpack("Q"))
        start, self._position = self._position, self._position + length
        if self._position > len(self._data):
            raise ValueError("a string goes beyond the file's end")
        return self._data[start : self._position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Scalar | list[Scalar]:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(_FORMATS[kind])
        kind, count = int(self.unpack("I")), int(self.unpack("Q"))
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return self._numbers(_FORMATS[kind], count)

    def _numbers(self, code: str, count: int) -> list[Scalar]:
        form = f"<{count}{code}"
        start, self._position = self._position, self._position + struct.calcsize(form)
        return list(struct.unpack_from(form, self._data, start))
