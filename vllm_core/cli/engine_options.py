"""The options of every command that opens an engine, and the EngineConfig that they make.

Knows: option names, sizes such as 512M. Does not know: what the engine does with them.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm_core.config import EngineConfig

if TYPE_CHECKING:
    from vllm_core.llm import LLM

_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "512M", "2G", "1.5GiB", "4096": powers of 1,024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write 512M, 2G or a count of bytes"
        )
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Every option's dest is a field of EngineConfig, whose default it keeps when not given."""
    group = parser.add_argument_group("engine", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--model", default="demo", help="directory, GGUF file or hub id (default: the demo weights)"
    )
    group.add_argument("--tokenizer", help="directory, file or hub id (default: the model's own)")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--backend", help="a name that `doctor` lists (default: the best with a device)"
    )
    group.add_argument("--dtype", help="auto, float32, bfloat16, float16 or float64")
    group.add_argument(
        "--load-format",
        help="auto, safetensors, gguf, or dummy (random weights of the model's shape)",
    )
    group.add_argument(
        "--quantization",
        metavar="SCHEME",
        help="int8, int4, int4-g32, int4-g64, int4-g128 (inputs that share a scale at most; int4: "
        "64), each also with -weight-only behind it, or dense (default: as the file has it where "
        "the backend multiplies such codes, else dense)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="auto (the model's dtype) or int8, which holds about twice as many tokens",
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="most tokens of prompt and answer together"
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run at once")
    group.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="token budget of one step"
    )
    group.add_argument("--block-size", type=int, metavar="N", help="tokens per KV block")
    group.add_argument(
        "--kv-cache-memory", type=parse_size, metavar="SIZE", help="for the KV cache: 512M, 2G"
    )
    group.add_argument(
        "--memory-utilization", type=float, metavar="SHARE", help="of the device's free memory"
    )
    group.add_argument("--no-prefix-caching", dest="enable_prefix_caching", action="store_false")
    group.add_argument("--no-async-scheduling", dest="async_scheduling", action="store_false")
    group.add_argument("--scheduling-policy", help="fcfs or priority")
    group.add_argument(
        "--seed", type=int, metavar="N", help="makes random draws the same in every run"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of a CPU device")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises InvalidArgument for what contradicts itself or is out of range."""
    known = EngineConfig.__dataclass_fields__
    return EngineConfig(**{name: value for name, value in vars(args).items() if name in known})


def open_llm(args: argparse.Namespace) -> LLM:
    """The engine that the command line asks for; loads the weights."""
    config = engine_config(args)  # before the import: wrong options are refused at once
    from vllm_core.llm import LLM

    return LLM(progress=True, **asdict(config))
