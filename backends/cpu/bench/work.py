"""What every engine of a comparison is asked to do, and what is told of it: one line of JSON in,
one out. Runs in the environment of each engine, so it needs the standard library only.

Knows: rows, prompts, time stamps. Does not know: engines.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROWS: dict[str, tuple[int, int, int, int]] = {
    "decode 1": (1, 128, 64, 0),
    "decode 8": (8, 128, 64, 0),
    "decode 32": (32, 128, 64, 0),
    "prefill 1024": (1, 1024, 1, 0),
    "prefill 4096": (1, 4096, 1, 0),
    "32 x 256 + 64": (32, 256, 64, 0),
    "32 x 1024, 960 shared, + 32": (32, 1024, 32, 960),
}
"""Name -> requests, tokens of a prompt, tokens of an answer, tokens that all prompts share."""
MAX_LEN = 4608
MAX_ROWS = 64
PR_SET_PDEATHSIG = 1

Stamps = list[list[float]]
"""Of each request, when each of its tokens came."""
Run = Callable[[list[list[int]], int], Stamps]
"""(prompts, tokens of an answer) -> stamps by `time.perf_counter`; greedy, no end of sequence."""
Load = Callable[[str, int, str], tuple[dict[str, Any], Run]]
"""(model folder, threads, weights: bfloat16, int8 or int4) -> what to tell of the engine, and how
it is run."""


def make_prompts(row: str, vocab: int, seed: int) -> list[list[int]]:
    """Other ids for another seed, so that no prefix cache helps but where the row shares."""
    count, length, _, shared = ROWS[row]
    head = random.Random(seed * 7919 + 1)
    start = [head.randrange(300, int(vocab * 0.95)) for _ in range(shared)]
    prompts = []
    for index in range(count):
        own = random.Random(seed * 1_000_003 + index + 17)
        prompts.append(
            start + [own.randrange(300, int(vocab * 0.95)) for _ in range(length - shared)]
        )
    return prompts


def figures(row: str, start: float, stamps: Stamps) -> dict[str, float]:
    """wall_s; prefill_tok_s up to the last first token; decode_tok_s of the tokens behind it."""
    count, length, _, _ = ROWS[row]
    first = max(own[0] for own in stamps)
    last = max(own[-1] for own in stamps)
    after = sum(stamp > first for own in stamps for stamp in own)
    return {
        "wall_s": last - start,
        "prefill_tok_s": count * length / (first - start),
        "decode_tok_s": after / (last - first) if after else 0.0,
    }


def peak_bytes() -> int:
    """Most memory that each process of this tree held since `reset_peaks`, in sum; pages of a
    mapped file count."""
    total = 0
    for pid in _tree():
        with suppress(OSError):  # it ended meanwhile
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(
                int(line.split()[1]) * 1024
                for line in status.splitlines()
                if line.startswith("VmHWM")
            )
    return total


def reset_peaks() -> None:
    """From here on; a kernel without this goes on counting from the start."""
    for pid in _tree():
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def die_with_parent() -> None:
    """For `preexec_fn`: what a comparison started ends with it, however it ends, even stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def since_start() -> float:
    """Seconds since this process was started, so with what the interpreter and its imports took."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _tree() -> list[int]:
    return [os.getpid(), *_children(os.getpid())]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_children(int(child))]
    return found


def serve(name: str, load: Load, arguments: Sequence[str]) -> None:
    """argv: model folder, threads, weights. Says when it is ready, then runs the rows that are
    asked for."""
    folder, threads, weights = arguments[0], int(arguments[1]), arguments[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    vocab = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    imported = since_start()
    about, run = load(folder, threads, weights)
    loaded = since_start()
    first = run(make_prompts("decode 1", vocab, 999), 4)[0][0]
    answered = since_start() - (time.perf_counter() - first)
    run(make_prompts("decode 8", vocab, 998), 8)
    say(
        engine=name,
        **about,
        import_s=imported,
        load_s=loaded - imported,
        start_to_first_token_s=answered,
        peak_bytes=peak_bytes(),
    )
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = make_prompts(asked["row"], vocab, asked["seed"])
        # while an engine is stopped, systems drop pages of the files that it mapped: back with them
        run(make_prompts("decode 1", vocab, 500_000 + asked["seed"]), 2)
        reset_peaks()
        start = time.perf_counter()
        stamps = run(prompts, ROWS[asked["row"]][2])
        wrong = [len(own) for own in stamps if len(own) != ROWS[asked["row"]][2]]
        if wrong:
            say(error=f"answers of {wrong[:4]} tokens instead of {ROWS[asked['row']][2]}")
            continue
        say(**figures(asked["row"], start, stamps), peak_bytes=peak_bytes())
