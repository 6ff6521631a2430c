"""Ours beside other engines, in one run on one machine: same weights, same prompts, same threads.

Each engine is loaded once, in its own environment, and runs every row in turn with the others
stopped. Medians over the rounds; in between, what memory and matrix units can do is measured.

    python backends/cpu/bench/peers.py --peers DIR --rounds 3 --output peers.json

DIR holds an environment for each peer (DIR/openvino, DIR/vllm) and the model (DIR/models/NAME, and
NAME-ov as optimum-intel exports it). An engine without its environment is left out, and said so.

Knows: processes, turns, medians. Does not know: engines.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from work import ROWS

PLACE = Path(__file__).resolve().parent
ENGINES = {"vllm-core": None, "openvino": "openvino", "vllm": "vllm"}
"""Name -> folder of its environment below --peers; None: this one."""
SCRIPTS = {name: PLACE / f"engine_{name.replace('-', '_')}.py" for name in ENGINES}


class Engine:
    """One process, which runs only while it is asked."""

    def __init__(self, name: str, python: Path, model: Path, threads: int, log: Path) -> None:
        self.name = name
        environment = dict(os.environ)
        if name == "vllm":
            environment |= _vllm_environment(python.parent.parent, threads)
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS[name]), str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.about = self._answer()

    def run(self, row: str, seed: int) -> dict[str, Any]:
        """Figures of one row, with all others stopped."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(json.dumps({"row": row, "seed": seed}), file=self._process.stdin, flush=True)
        found = self._answer()
        self._signal(signal.SIGSTOP)
        return found

    def stop(self) -> None:
        """Until it is asked again."""
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """For good."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: see its log")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def _vllm_environment(place: Path, threads: int) -> dict[str, str]:
    """As its documentation asks for on CPUs."""
    found = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    library = place / "lib" / "libiomp5.so"
    return found | ({"LD_PRELOAD": str(library)} if library.exists() else {})


def read_bandwidth(program: Path, threads: int) -> float:
    """GB/s, median of two seconds."""
    command = [str(program), "1", str(threads), "2"]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    )


def build_reader(folder: Path) -> Path:
    """The program that measures bandwidth."""
    program = folder / "read_bandwidth"
    command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-pthread", "-Wno-psabi"]
    subprocess.run([*command, str(PLACE / "read_bandwidth.cpp"), "-o", str(program)], check=True)
    return program


def matmul_rate(model: Path, threads: int) -> dict[str, float]:
    """TFLOP/s of bfloat16 on the model's own shapes at 1,024 rows, weighed as the model does: ours
    and torch's."""
    command = [sys.executable, str(PLACE / "matmul_rate.py"), str(model), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Figure -> median over the rounds."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a line per row of work, a column per engine, ours over the best of the others."""
    names = list(results)
    lines = ["| work | " + " | ".join(names) + " | ratio |", "|---|" + "---:|" * (len(names) + 1)]
    for row in ROWS:
        kind = row.split()[0]
        figure = {"decode": "decode_tok_s", "prefill": "prefill_tok_s"}.get(kind, "wall_s")
        values = [results[name][row][figure] for name in names if row in results[name]]
        others = values[1:]
        ratio = ""
        if others:
            ours = values[0]
            ratio = f"{min(others) / ours if figure == 'wall_s' else ours / max(others):.2f}"
        unit = "s" if figure == "wall_s" else "tok/s"
        shown = " | ".join(f"{value:,.1f}" for value in values)
        lines.append(f"| {row}, {unit} | {shown} | {ratio} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "peers")
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a folder below PEERS/models")
    parser.add_argument("--engines", default=",".join(ENGINES), help="ours first")
    parser.add_argument("--rows", default=";".join(ROWS), help="of: " + "; ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="everything as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model = args.peers / "models" / args.model
    wanted = [row.strip() for row in args.rows.split(";")]
    engines: list[Engine] = []
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    limits: dict[str, list[float]] = {"read GB/s": []}
    with tempfile.TemporaryDirectory() as folder:
        reader = build_reader(Path(folder))
        try:
            for name in args.engines.split(","):
                place = ENGINES[name]
                python = (
                    Path(sys.executable) if place is None else args.peers / place / "bin/python"
                )
                if not python.exists():
                    print(f"{name}: not compared, there is no {python}", flush=True)
                    continue
                engine = Engine(name, python, model, args.threads, Path(folder) / f"{name}.log")
                engine.stop()
                engines.append(engine)
                print(name, engine.about, flush=True)
            limits |= {k: [v] for k, v in matmul_rate(model, args.threads).items()}
            for turn in range(args.rounds):
                limits["read GB/s"].append(read_bandwidth(reader, args.threads))
                for number, row in enumerate(wanted):
                    for engine in engines:
                        found = engine.run(row, 100 * turn + number)
                        if "error" in found:
                            raise RuntimeError(f"{engine.name}, {row}: {found['error']}")
                        runs.setdefault(engine.name, {}).setdefault(row, []).append(found)
                        shown = {k: round(v, 2) for k, v in found.items() if k != "peak_bytes"}
                        print(turn, row, engine.name, shown, flush=True)
                limits["read GB/s"].append(read_bandwidth(reader, args.threads))
        finally:
            for engine in engines:
                engine.close()
    results = {
        name: {row: medians(found) for row, found in rows.items()} for name, rows in runs.items()
    }
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": args.threads,
        "engines": {engine.name: engine.about for engine in engines},
        "limits": {name: statistics.median(values) for name, values in limits.items()},
        "medians": results,
        "rounds": runs,
    }
    print(json.dumps(summary["limits"]), table(results), sep="\n")
    if args.output:
        args.output.write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
