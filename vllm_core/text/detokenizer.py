"""Turns the tokens of one sequence into text as they come.

Knows: unfinished characters, the prompt's end, stop strings. Does not know: requests, streams.

Text is given out once it can no longer change: never a part of a character, and nothing that may be
the beginning of a stop string. Each token is looked at once, so the cost per token does not grow.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from os.path import commonprefix

from vllm_core.errors import InvalidArgument
from vllm_core.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What bytes that are no UTF-8 are shown as."""


class IncrementalDetokenizer:
    """The output text of one sequence, piece by piece.

    All pieces together are what `tokenizer.decode(prompt + output)` has behind `decode(prompt)`,
    cut at the first stop string: the one that ends first, of several that end at one place the
    longest. A stop string counts when it ends behind the text of the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0
        """Tokens taken in; those that follow a stop string are not."""
        self.stopped: str | None = None
        """The stop string that ended the text."""
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        kind = _BytesToText if tokenizer.is_byte_level else _PiecesToText
        self._source = kind(tokenizer, prompt_ids, self._skipped)
        self._stops = [_StopString(s) for s in dict.fromkeys(stop)]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""  # known text that may begin a stop string
        self._given: list[str] = []

    @property
    def text(self) -> str:
        """All text given out so far."""
        self._given = ["".join(self._given)]
        return self._given[0]

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that they settle."""
        settled = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if token_id not in self._skipped:
                settled += self._settle(self._source.feed(token_id))
        self._given.append(settled)
        return settled

    def finish(self) -> str:
        """The text that was held back, when no further token comes."""
        settled = ""
        if self.stopped is None:
            settled = self._settle(self._source.flush())
            settled += self._held
            self._held = ""
        self._given.append(settled)
        return settled

    def _settle(self, text: str) -> str:
        """Of the text held back and the new one, what certainly belongs to no stop string."""
        if not self._stops or not text:
            return text
        known = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [stop.text for stop in self._stops if stop.matches(char)]
            if complete and self.num_tokens > self._min_tokens:
                self.stopped = max(complete, key=len)
                self._held = ""
                return known[: end if self._include_stop else end - len(self.stopped)]
        # Included stop strings are shown anyway, so nothing needs to wait for them.
        num_held = 0 if self._include_stop else max(s.num_matched for s in self._stops)
        self._held = known[len(known) - num_held :]
        return known[: len(known) - num_held]


class _BytesToText:
    """Byte-level tokenizers: all tokens are bytes of one UTF-8 text."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skipped: Collection[int]
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= 3:  # the longest part of a character that can wait for its end
                break
            if token_id not in skipped:
                tail = self._token_bytes(token_id) + tail
        self._utf8.decode(tail)
        self._prompt_waits = self._utf8.getstate()[0] != b""

    def feed(self, token_id: int) -> str:
        return self._own(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        return self._own(self._utf8.decode(b"", final=True))

    def _own(self, text: str) -> str:
        """Without the replacement of a character that the prompt began and that never ends."""
        if text and self._prompt_waits:
            self._prompt_waits = False
            return text.removeprefix(REPLACEMENT)
        return text


class _PiecesToText:
    """Tokenizers whose tokens are text, some with tokens for single bytes beside.

    A run of byte tokens is one text when it is UTF-8 as a whole, else each byte is replaced: so
    nothing of it is certain before it ends.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skipped: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.fallback_bytes
        self._at_start = True  # of the whole text, where decoders drop a space
        run: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id in self._bytes:
                run.append(token_id)
            elif token_id not in skipped and tokenizer.token_bytes(token_id):
                self._at_start = False
                break
        self._run = run[::-1]
        self._run_in_prompt = self._run_text()

    def feed(self, token_id: int) -> str:
        if token_id in self._bytes:
            self._run.append(token_id)
            return ""
        before = self.flush()
        piece = self._tokenizer.token_text(token_id)
        if self._at_start and piece:
            self._at_start = False
            piece = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return before + piece

    def flush(self) -> str:
        if not self._run:
            return ""
        text = self._run_text()
        known = commonprefix((self._run_in_prompt, text))  # noqa: RUF071 (these are no paths)
        own = text[len(known) :]
        self._run.clear()
        self._run_in_prompt = ""
        self._at_start = False
        return own

    def _run_text(self) -> str:
        if self._at_start:
            return self._tokenizer.decode(self._run)
        try:
            return bytes(self._bytes[i] for i in self._run).decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._run)


class _StopString:
    """Finds one string in a stream of characters (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        if not text:
            raise InvalidArgument("a stop string must not be empty")
        self.text = text
        self.num_matched = 0
        """Characters at the end of the stream that begin the string; all of them: it ends here."""
        self._shorter = [0] * (len(text) + 1)
        for n in range(2, len(text) + 1):
            self._shorter[n] = self._extend(self._shorter[n - 1], text[n - 1])

    def matches(self, char: str) -> bool:
        """Takes the next character; whether the string ends with it."""
        self.num_matched = self._extend(self.num_matched, char)
        return self.num_matched == len(self.text)

    def _extend(self, matched: int, char: str) -> int:
        """The longest beginning of the string behind which `char` also fits."""
        while matched == len(self.text) or self.text[matched] != char:
            if matched == 0:
                return 0
            matched = self._shorter[matched]
        return matched + 1
