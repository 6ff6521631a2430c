"""Turns events into what a caller gets: token lists, text, log-probabilities, finish reasons.

Text is made token by token only where somebody reads it as it comes or a stop string waits;
otherwise once, at the end.

Knows: tokens and text. Does not know: blocks, rows, devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_core.engine.request import Event, Request, Sequence
from vllm_core.ops import HostArray, Logprobs
from vllm_core.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from vllm_core.text.detokenizer import IncrementalDetokenizer
from vllm_core.text.tokenizer import Tokenizer


@dataclass(eq=False)
class _Stream:
    """One sequence so far."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    detokenizer: IncrementalDetokenizer | None = None
    text: str = ""


@dataclass(eq=False)
class RequestState:
    """One request so far; `output` is a snapshot of it."""

    request: Request
    prompt: str | None
    tokenizer: Tokenizer | None
    is_streaming: bool
    streams: list[_Stream] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self.streams = [_Stream(s) for s in self.request.sequences]
        for stream in self.streams:
            if params.logprobs is not None:
                stream.logprobs = []
            if self.tokenizer is not None and (self.is_streaming or params.stop):
                stream.detokenizer = self._detokenizer(self.tokenizer)
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def _detokenizer(self, tokenizer: Tokenizer) -> IncrementalDetokenizer:
        params = self.request.params
        return IncrementalDetokenizer(
            tokenizer,
            self.request.prompt,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def take(self, event: Event) -> str | None:
        """Adds what a step drew -> the stop string that it completed, if any."""
        stream = self.streams[event.sequence.index]
        if event.prompt_scores is not None and self.prompt_logprobs is not None:
            self._take_prompt_scores(*event.prompt_scores)
        if event.token is None:
            return None
        stream.tokens.append(event.token)
        if stream.logprobs is not None and event.logprobs is not None:
            own = event.logprobs
            stream.logprobs.append(self._table(own.ids, own.values, int(own.rank)))
        if stream.detokenizer is not None:
            stream.text += stream.detokenizer.push([event.token])
            return stream.detokenizer.stopped
        return None

    def _take_prompt_scores(self, first: int, scores: Logprobs) -> None:
        assert self.prompt_logprobs is not None
        assert first == len(self.prompt_logprobs), "prompt scores come in order"
        for ids, values, rank in zip(scores.ids, scores.values, scores.rank, strict=True):
            self.prompt_logprobs.append(self._table(ids, values, int(rank)))

    def _table(self, ids: HostArray, values: HostArray, rank: int) -> TokenLogprobs:
        """Column 0 is the token itself, the rest the most likely ones in order."""
        found: TokenLogprobs = {}
        for place, (token, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
            if token not in found:
                text = self.tokenizer.token_text(token) if self.tokenizer else None
                found[token] = Logprob(value, place or rank, text)
        return found

    def end(self, sequence: Sequence) -> None:
        """The sequence is finished: flushes the text that was held back."""
        stream = self.streams[sequence.index]
        if self.tokenizer is None:
            return
        if stream.detokenizer is None:
            stream.detokenizer = self._detokenizer(self.tokenizer)
            stream.text += stream.detokenizer.push(stream.tokens)
        stream.text += stream.detokenizer.finish()

    def output(self) -> RequestOutput:
        request = self.request
        errors = [s.error for s in request.sequences if s.error is not None]
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=request.prompt,
            outputs=[
                CompletionOutput(
                    index=stream.sequence.index,
                    text=stream.text,
                    token_ids=list(stream.tokens),
                    logprobs=None if stream.logprobs is None else list(stream.logprobs),
                    finish_reason=stream.sequence.finish_reason,
                    stop_reason=stream.sequence.stop_reason,
                )
                for stream in self.streams
            ],
            is_finished=request.is_finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=request.sequences[0].num_hit_tokens,
            num_preemptions=sum(s.num_preemptions for s in request.sequences),
            error=errors[0] if errors else None,
        )
