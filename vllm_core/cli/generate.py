"""Continue prompts: the arguments, a file with one per line, or the whole input as one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vllm_core.cli.engine_options import add_engine_options, open_llm
from vllm_core.cli.reading import read_file, read_input
from vllm_core.cli.sampling_options import (
    add_result_options,
    add_sampling_options,
    sampling_params,
)
from vllm_core.errors import InvalidArgument
from vllm_core.outputs import RequestOutput
from vllm_core.params import SamplingParams

SUMMARY = "continue one prompt or many"

MAX_TOKENS = 128
"""Most tokens per answer unless --max-tokens says otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt per line")
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON per prompt, with everything known"
    )
    add_engine_options(parser)
    add_sampling_options(parser)
    add_result_options(parser)


def run(args: argparse.Namespace) -> int:
    sampling_params(args, SamplingParams(max_tokens=None))  # refused before the weights are read
    prompts = _read_prompts(args.prompts, args.prompt_file)
    with open_llm(args) as llm:
        params = sampling_params(args, llm.default_sampling_params().replace(max_tokens=MAX_TOKENS))
        outputs = llm.generate(prompts, params, progress=len(prompts) > 1 and sys.stderr.isatty())
    for number, output in enumerate(outputs, 1):
        if args.json:
            print(json.dumps(asdict(output), ensure_ascii=False))
        else:
            _print_text(output, f"{number}/{len(outputs)}" if len(outputs) > 1 else "")
    failed = [output for output in outputs if output.error is not None]
    for output in failed:
        print(f"error: request {output.request_id}: {output.error}", file=sys.stderr)
    return 1 if failed else 0


def _read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    if given and file is not None:
        raise InvalidArgument("prompts came as arguments and as --prompt-file; give one of them")
    if file is not None:
        text = read_file("--prompt-file", file)
        prompts = [line for line in text.splitlines() if line.strip()]
    elif given:
        prompts = list(given)
    else:
        prompts = [read_input().rstrip("\n")]
    if not prompts or not all(prompts):
        raise InvalidArgument(
            "a prompt is empty; give PROMPT, --prompt-file FILE, or pipe text into the command"
        )
    return prompts


def _print_text(output: RequestOutput, number: str) -> None:
    """The answer alone where there is one; a heading above each where there are more."""
    for completion in output.outputs:
        if number or len(output.outputs) > 1:
            label = " ".join(
                part
                for part in (number, f"answer {completion.index}" * (len(output.outputs) > 1))
                if part
            )
            print(f"=== {label}: {output.prompt!r}")
        print(completion.text)
