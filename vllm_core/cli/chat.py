"""Talk to a model; the answer is streamed to stdout, everything else goes to stderr.

In a terminal: /reset forgets the conversation, /system TEXT sets the system message, /exit or
Ctrl-D leaves, Ctrl-C stops the answer. Without a terminal the prompt is read from the input.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from vllm_core.cli.description import format_description, format_kv_use
from vllm_core.cli.engine_options import add_engine_options, open_llm
from vllm_core.cli.reading import read_file, read_input
from vllm_core.cli.sampling_options import add_sampling_options, sampling_params
from vllm_core.errors import InvalidArgument, RequestFailed, VllmCoreError
from vllm_core.params import SamplingParams

if TYPE_CHECKING:
    from vllm_core.llm import LLM

SUMMARY = "talk to a model"

MAX_TOKENS = 512
"""Most tokens of an answer unless --max-tokens says otherwise."""

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer and end")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="after --prompt, go on if in a terminal"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja to take instead of the model's"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print the answers and nothing else"
    )
    add_engine_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    sampling_params(args, SamplingParams(max_tokens=None))  # refused before the weights are read
    is_terminal = sys.stdin.isatty()
    prompt: str | None = args.prompt
    if prompt is None and not is_terminal:
        prompt = read_input()
    if prompt is not None and not prompt.strip():
        raise InvalidArgument(
            "the prompt is empty; give --prompt TEXT or pipe text into the command"
        )
    template = None
    if args.chat_template is not None:
        template = read_file("--chat-template", args.chat_template)
    stays = is_terminal and (prompt is None or args.interactive)
    with open_llm(args) as llm:
        if not args.quiet:
            print(format_description(llm.describe()), file=sys.stderr, flush=True)
        params = sampling_params(args, llm.default_sampling_params().replace(max_tokens=MAX_TOKENS))
        conversation = Conversation(llm, params, args.system, template, is_quiet=args.quiet)
        if prompt is not None:
            if stays:
                print(f"> {prompt}")
            if not conversation.ask(prompt) and not stays:
                raise KeyboardInterrupt
        if stays:
            _loop(conversation)
    return 0


class Conversation:
    """The messages so far; `ask` adds a question and its answer."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        template: str | None = None,
        *,
        is_quiet: bool = False,
    ) -> None:
        self._llm = llm
        self._template = template
        self._params = params
        self._is_quiet = is_quiet
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets everything; keeps the system message unless a new one is given."""
        kept = [m for m in self.messages if m["role"] == "system"]
        self.messages = [{"role": "system", "content": system}] if system else kept

    def ask(self, prompt: str) -> bool:
        """Streams the answer to stdout; False when Ctrl-C cut it short (what came is kept).

        A question that could not be answered is forgotten, its error raised.
        """
        question = [*self.messages, {"role": "user", "content": prompt}]
        answer, was_interrupted = self._stream(question)
        self.messages = [*question, {"role": "assistant", "content": answer}]
        return not was_interrupted

    def _stream(self, messages: list[dict[str, str]]) -> tuple[str, bool]:
        start = first = last = time.perf_counter()
        text, num_tokens, most_blocks = "", 0, 0
        outputs = self._llm.stream_chat(messages, self._params, chat_template=self._template)
        with _Interruption() as interruption, contextlib.closing(outputs) as stream:
            for output in stream:
                if output.error is not None:
                    raise RequestFailed(output.error)
                completion = output.outputs[0]
                last = time.perf_counter()
                if num_tokens == 0:
                    first = last
                num_tokens = len(completion.token_ids)
                most_blocks = max(most_blocks, int(self._llm.stats()["kv_blocks_used"]))
                sys.stdout.write(completion.text[len(text) :])
                sys.stdout.flush()
                text = completion.text
                if interruption.came:
                    break
        print()
        if not self._is_quiet:
            rate = (num_tokens - 1) / (last - first) if last > first else 0.0
            print(
                f"[{num_tokens} tokens, {rate:.1f} tokens/s, first after {first - start:.2f} s; "
                f"{format_kv_use(most_blocks, self._llm.stats())}]",
                file=sys.stderr,
                flush=True,
            )
        return text, interruption.came


class _Interruption:
    """Ctrl-C as a flag, so that it never cuts through a step of the engine; the second one does."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> _Interruption:
        self._usual = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.signal(signal.SIGINT, self._usual)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._usual)


def _loop(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    print(f"{HELP}; Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/exit":
            return
        if line.startswith("/"):
            _command(conversation, line)
        elif line:
            try:
                conversation.ask(line)
            except VllmCoreError as error:
                print(f"error: {error}", file=sys.stderr)


def _command(conversation: Conversation, line: str) -> None:
    name, _, text = line.partition(" ")
    if name == "/reset":
        conversation.reset()
    elif name == "/system" and text.strip():
        conversation.reset(text.strip())
    else:
        print(HELP, file=sys.stderr)
