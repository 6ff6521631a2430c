"""The sampling options of the commands, and the SamplingParams that they make.

Knows: option names. Does not know: ranges and contradictions, which params.py checks.
"""

from __future__ import annotations

import argparse

from vllm_core.params import SamplingParams


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Every option's dest is a field of SamplingParams; one not given keeps the model's default."""
    group = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    group.add_argument("--min-tokens", type=int, metavar="N", help="no end before this many tokens")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument(
        "--top-k", type=int, metavar="N", help="keep the N most likely tokens; 0: all"
    )
    group.add_argument("--top-p", type=float, metavar="X", help="keep this much probability")
    group.add_argument("--min-p", type=float, metavar="X", help="relative to the most likely token")
    group.add_argument("--presence-penalty", type=float, metavar="X")
    group.add_argument("--frequency-penalty", type=float, metavar="X")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument(
        "--stop-token-ids", action="append", type=int, metavar="ID", help="may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on behind the end of sequence")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """For the commands that can show more than one answer and its log-probabilities."""
    group = parser.add_argument_group("results", argument_default=argparse.SUPPRESS)
    group.add_argument("-n", type=int, metavar="N", help="answers per prompt")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities of the N best tokens (--json)"
    )
    group.add_argument("--prompt-logprobs", type=int, metavar="N", help="the same for the prompt")


def sampling_params(args: argparse.Namespace, base: SamplingParams) -> SamplingParams:
    """`base` with what the command line gives; raises InvalidArgument.

    The engine's --seed is no field of a request: it seeds all that bring none.
    """
    known = SamplingParams.__dataclass_fields__.keys() - {"seed"}
    return base.replace(**{name: value for name, value in vars(args).items() if name in known})
