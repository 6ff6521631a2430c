"""Cases: outputs against float64, in units of their own noise, by shape and regime of numbers.

Knows: which shape meets which lengths and numbers. Does not know: how they are judged.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_core_conformance.case import Case, Evidence
from vllm_core_conformance.cases.attention_check import play_rows
from vllm_core_conformance.cases.attention_shapes import RECIPES, Rows, decoding, mixture
from vllm_core_conformance.inputs import Random, random
from vllm_core_conformance.target import Target

Lengths = Callable[[Target, str, Random], Rows]

SMOKE = frozenset({"smoke"})


def _prompts(target: Target, name: str, rng: Random) -> Rows:
    """Chunks that end around usual tiles, fresh and behind odd prefixes."""
    odd = int(rng.integers(0, 3))
    return [(100 + odd, 1), (0, 129), (256 + odd, 63), (382 + odd, 129 - odd)]


def _thousands(target: Target, name: str, rng: Random) -> Rows:
    return [(4900 + int(rng.integers(150)), 1), (4095, 1), (1500, 3), (17, 1)]


def _many_thousands(target: Target, name: str, rng: Random) -> Rows:
    return [(32_900 + int(rng.integers(200)), 1), (200, 3)]


def _numbers(
    what: str,
    name: str,
    says: str,
    lengths: Lengths = mixture,
    regime: str = "normal",
    more: frozenset[str] = frozenset(),
) -> Case:
    case = f"attention.numbers.{what}"

    def run(target: Target, seed: int) -> Evidence:
        rng = random(seed, case)
        rows = lengths(target, name, rng)
        return play_rows(target, name, rng, rows, regime, says, exact=True)

    return Case(
        case,
        f"{says}: right to its own rounding",
        run,
        more | {"core"},
        needs=RECIPES[name].needs,
        every_dtype=True,
    )


CASES: tuple[Case, ...] = (
    _numbers("mixed", "mixed", "prompts, chunks and decoding rows in one step", more=SMOKE),
    _numbers("decode", "decode", "dozens of decoding rows", decoding),
    _numbers("prompts", "prefill", "long chunks that end around tiles", _prompts),
    _numbers("one_kv_head", "mqa", "20 query heads on one KV head, sliced from one tensor"),
    _numbers("seven_per_group", "heads_7", "7 query heads on one KV head"),
    _numbers("largest_block", "largest_block", "the largest block, two groups in one pool"),
    _numbers("smallest_block", "smallest_block", "the smallest block, heads of 16"),
    _numbers("narrow", "narrow", "heads of 2"),
    _numbers("window", "window", "a window that is no multiple of a block"),
    _numbers("window_short", "window_short", "a window of 3"),
    _numbers("sinks", "sinks", "sinks of every size, heads of 72", more=SMOKE),
    _numbers("window_sinks", "window_sinks", "sinks and a window of many blocks"),
    _numbers("softcap", "softcap", "softcap 7.5, heads of 96", more=SMOKE),
    _numbers("softcap_peaked", "softcap", "scores far above the softcap", regime="peaked"),
    _numbers("softcap_window", "softcap_window", "softcap and a window, heads of 256"),
    _numbers("peaked", "mixed", "scores that single out few tokens", regime="peaked"),
    _numbers("huge", "mixed", "scores of 300 that differ by 2", regime="huge", more=SMOKE),
    _numbers("vast", "mixed", "scores of 100,000, below any number that masks", regime="vast"),
    _numbers("vast_window", "window", "scores of 100,000 beside a window", regime="vast"),
    _numbers("huge_sinks", "window_sinks", "sinks beside scores of 300", regime="huge"),
    _numbers("huge_long", "long", "scores of 300 in contexts of 5,000", _thousands, "huge"),
    _numbers("tiny", "mixed", "queries, keys and values near the end of the range", regime="tiny"),
    _numbers(
        "outlier", "mixed", "one channel of K and one of V 1000 times larger", regime="outlier"
    ),
    _numbers("long", "long", "contexts of 5,000", _thousands),
    _numbers("very_long", "very_long", "a context of 33,000", _many_thousands),
)
