"""Perplexity of a text, scheme by scheme, beside the same weights dense in float32.

The text is cut into windows that are scored by themselves; every token but a window's first counts.

Knows: text, windows, log-probabilities. Does not know: how weights are stored.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_core.cli.engine_options import add_engine_options, engine_config
from vllm_core.config import EngineConfig
from vllm_core.errors import InvalidArgument
from vllm_core.params import SamplingParams

if TYPE_CHECKING:
    from vllm_core.llm import LLM

SUMMARY = "perplexity of a text under each quantization"

REFERENCE = "float32 dense"
FILE = "as the file is"
"""No quantization asked for: a GGUF file's codes, where the backend keeps them."""
SCHEMES = ("dense", "int8", "int4", "int8-weight-only", "int4-weight-only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", type=Path, metavar="FILE", help="a text file, or a .gz of one")
    parser.add_argument("--num-tokens", type=int, default=8192, metavar="N", help="of its start")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens of context")
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=[*SCHEMES, "file"],
        metavar="SCHEME",
        help="quantizations to compare; file: none asked for (default: all)",
    )
    add_engine_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.window < 2 or args.num_tokens < args.window:
        raise InvalidArgument("--window must be at least 2, and --num-tokens at least --window")
    text, config = _read(args.text), engine_config(args)
    runs = {REFERENCE: replace(config, dtype="float32", quantization="dense")}
    for scheme in args.schemes:
        if scheme == "file":
            runs[FILE] = replace(config, quantization=None)
        else:
            runs[scheme] = replace(config, quantization=scheme)
    results: list[dict[str, Any]] = []
    first: list[tuple[float, int]] = []
    for name, own in runs.items():
        start = time.perf_counter()
        scores, facts = _scores(own, text, args.num_tokens, args.window)
        first = first or scores
        result = {"scheme": name, **facts, **_compared(scores, first)}
        result["seconds"] = time.perf_counter() - start
        results.append(result)
        print(_line(result), file=sys.stderr, flush=True)
    return {
        "config": asdict(config),
        "num_tokens": len(first),
        "window": args.window,
        "results": results,
    }


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InvalidArgument(f"cannot read the text {path}: {error}") from error


def _scores(
    config: EngineConfig, text: str, num_tokens: int, window: int
) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """(log-probability, rank) of each token that counts, and the engine's own facts."""
    from vllm_core.llm import LLM

    options = asdict(config)
    with LLM(options.pop("model"), **options) as llm:
        description = llm.describe()
        facts = {
            "dtype": description["model"]["dtype"],
            "weights": description["model"]["weights"],
            "weight_bytes": dict(description["memory"])["weights"],
        }
        return _score_windows(llm, _windows(llm, text, num_tokens, window)), facts


def _windows(llm: LLM, text: str, num_tokens: int, window: int) -> list[list[int]]:
    if llm.tokenizer is None:
        raise InvalidArgument("a model without a tokenizer cannot read a text")
    if window >= llm.describe()["model"]["context"]:
        raise InvalidArgument("--window must be shorter than the model's context")
    # a token has at least a byte, so there are enough without reading all of a long text
    ids = llm.tokenizer.encode(text[: 16 * num_tokens])[:num_tokens]
    windows = [ids[at : at + window] for at in range(0, len(ids), window)]
    found = [one for one in windows if len(one) > 1]
    if not found:
        raise InvalidArgument("the text is shorter than two tokens")
    return found


def _score_windows(llm: LLM, windows: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = []
    for output in llm.generate([list(window) for window in windows], params, progress=False):
        if output.error is not None or output.prompt_logprobs is None:
            raise InvalidArgument(f"a window could not be scored: {output.error}")
        for token, table in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if table is not None:
                found.append((table[token].logprob, table[token].rank))
    return found


def _compared(
    scores: Sequence[tuple[float, int]], first: Sequence[tuple[float, int]]
) -> dict[str, float]:
    """Perplexity, its ratio to the first's, mean difference of a token's log-probability, and the
    share of tokens that both or neither have at the top."""
    count = len(scores)
    loss, own = (-sum(score for score, _ in some) / count for some in (scores, first))
    pairs = list(zip(scores, first, strict=True))
    return {
        "perplexity": math.exp(loss),
        "ratio": math.exp(loss - own),
        "mean_difference": sum(abs(a - b) for (a, _), (b, _) in pairs) / count,
        "top_agreement": sum((a == 1) == (b == 1) for (_, a), (_, b) in pairs) / count,
    }


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['scheme']:18} {result['dtype']:9} {result['weight_bytes'] / 2**20:7.1f} MiB  "
        f"perplexity {result['perplexity']:8.3f}  x {result['ratio']:.4f}  "
        f"difference {result['mean_difference']:.4f}  {result['seconds']:.0f} s"
    )
