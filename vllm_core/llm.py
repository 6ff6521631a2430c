"""The offline API: many prompts in, all outputs back, over the same engine that servers use.

Knows: lists of prompts, progress, streams. Does not know: scheduling, devices.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from collections.abc import Sequence as Many
from numbers import Integral
from types import TracebackType
from typing import Any

from vllm_core.config import EngineConfig
from vllm_core.engine.engine import LLMEngine, Message, Prompt
from vllm_core.engine.output import RequestState
from vllm_core.errors import InvalidArgument
from vllm_core.outputs import RequestOutput
from vllm_core.params import SamplingParams
from vllm_core.progress import load_progress, request_progress
from vllm_core.text.tokenizer import Tokenizer


class LLM:
    """A model on a device.

    >>> with LLM("demo") as llm:
    ...     [output] = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
    ...     print(output.outputs[0].text)

    Keyword arguments are the fields of EngineConfig. Raises ModelError, WeightError, BackendError,
    NotSupported, CapacityError, InvalidArgument.
    """

    def __init__(self, model: str = "demo", *, progress: bool = False, **config: Any) -> None:
        try:
            self.config = EngineConfig(model=model, **config)
        except TypeError as error:
            raise InvalidArgument(f"{error}".replace("EngineConfig.__init__()", "LLM()")) from None
        with load_progress(progress) as report:
            self._engine = LLMEngine(self.config, report)

    # ---------------------------------------------------------------- whole answers
    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        progress: bool = True,
        priority: Many[int] | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt (text or token ids); one RequestOutput each, in order.

        One SamplingParams for all, or one each; None: the model's own defaults. A bad prompt raises
        before anything runs; a request that fails later has finish_reason "error" and the others go
        on.
        """
        many = _as_prompts(prompts)
        params = _as_params(sampling_params, len(many))
        ranks = list(priority) if priority is not None else [0] * len(many)
        if len(ranks) != len(many):
            raise InvalidArgument(f"{len(many)} prompts, but {len(ranks)} priorities")
        engine = self._engine
        states = [
            engine.make_request(prompt, p, priority=rank)
            for prompt, p, rank in zip(many, params, ranks, strict=True)
        ]
        return self._run(states, progress)

    def chat(
        self,
        messages: Many[Message] | Many[Many[Message]],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or many: lists of {"role": ..., "content": ...}."""
        if not messages:
            raise InvalidArgument("there are no messages; give at least one")
        is_one = isinstance(messages, (str, Mapping)) or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_one else messages
        ids = [self._engine.render(conversation, chat_template) for conversation in conversations]
        return self.generate(ids, sampling_params, progress=progress)

    def _run(self, states: list[RequestState], progress: bool) -> list[RequestOutput]:
        engine = self._engine
        added: list[RequestState] = []
        try:
            for state in states:
                engine.add(state)
                added.append(state)
            with request_progress(progress, states) as report:
                while any(not s.request.is_finished for s in states):
                    report(engine.step())
            self._drain()
        except BaseException:  # also Ctrl-C: nothing may run on unasked
            for state in added:
                engine.abort(state.request.request_id)
            raise
        return [state.output() for state in states]

    def _drain(self) -> None:
        """Takes in the step that ran ahead, so that nothing is left on the device; what an open
        stream asked for stays its own to run."""
        core = self._engine.core
        while core.has_work and not core.scheduler.has_work:
            self._engine.step()

    # ---------------------------------------------------------------- answers as they come
    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """The output so far after every step that changed it; closing the iterator ends the
        request."""
        engine = self._engine
        state = engine.make_request(prompt, sampling_params, is_streaming=True)
        engine.add(state)
        output: RequestOutput | None = None
        try:
            while not state.request.is_finished:
                if state in engine.step():
                    output = state.output()
                    yield output
            if output is None or not output.is_finished:  # it ended in a step of another call
                yield state.output()
            self._drain()
        finally:
            engine.abort(state.request.request_id)

    def stream_chat(
        self,
        messages: Many[Message],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """As `stream`, for a conversation."""
        return self.stream(self._engine.render(messages, chat_template), sampling_params)

    # ---------------------------------------------------------------- facts
    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for."""
        return self._engine.default_params()

    def describe(self) -> dict[str, Any]:
        """Backend, device, model and memory plan as plain data."""
        return self._engine.describe()

    def stats(self) -> dict[str, int]:
        """Counters since the start and the use of the KV cache now."""
        return self._engine.core.stats()

    def close(self) -> None:
        """Ends what runs and gives the device's memory back."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Many[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidArgument(
            f"prompts must be text, token ids or a list of these, not {type(prompts).__name__}"
        )
    many: list[Any] = list(prompts)
    if not many:
        raise InvalidArgument("there are no prompts; give at least one")
    return [many] if isinstance(many[0], Integral) else many


def _as_params(
    params: SamplingParams | Many[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidArgument(f"{count} prompts, but {len(params)} sampling parameters")
    return list(params)
