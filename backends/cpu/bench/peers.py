"""Ours beside other engines, in one run on one machine: same weights, same prompts, same threads.

Each engine is loaded once, in its own environment, and runs every row in turn with the others
stopped. Medians over the rounds; in between, what memory and matrix units can do is measured.

    python backends/cpu/bench/peers.py --peers DIR --rounds 3 --output peers.json
    python backends/cpu/bench/peers.py --weights int4 --rounds 3 --output peers-int4.json
    python backends/cpu/bench/plot.py peers.json peers.svg

DIR holds an environment for each peer (DIR/openvino, DIR/vllm, and DIR/llamacpp with its build) and
the model: DIR/models/NAME, NAME-ov[-int8|-int4] as optimum-intel exports it, and
NAME-{bf16,q8_0,q4_k_m}.gguf. An engine that cannot be compared is left out, and said so. Before an
engine starts the model's files are read, so that it finds them in the file cache; files of its
environment are as cold as they are.

Knows: processes, turns, medians. Does not know: engines.
"""

from __future__ import annotations

import argparse
import ctypes.util
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

from work import ROWS, die_with_parent

PLACE = Path(__file__).resolve().parent
OURS = "vllm-core"
ENGINES = {OURS: None, "openvino": "openvino", "llamacpp": "llamacpp", "vllm": "vllm"}
"""Name -> folder of its environment below --peers; None: this one."""
ONLY_BFLOAT16 = ("vllm",)
WEIGHTS = ("bfloat16", "int8", "int4")
QUANTISED_ROWS = ("decode 1", "decode 8", "decode 32", "prefill 1024")
SCRIPTS = {name: PLACE / f"engine_{name.replace('-', '_')}.py" for name in ENGINES}


class Engine:
    """One process, which runs only while it is asked."""

    def __init__(
        self, name: str, python: Path, model: Path, threads: int, weights: str, log: Path
    ) -> None:
        """RuntimeError with the end of its log when it does not start."""
        self.name, self._log = name, log
        environment = dict(os.environ)
        if name == "vllm":
            environment |= _vllm_environment(python.parent.parent, threads)
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS[name]), str(model), str(threads), weights],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=environment, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            self.about = self._answer()
        except RuntimeError:
            self.close()
            raise

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
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])
            raise RuntimeError(f"{self.name} ended; the last that it said:\n{end}")
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
    openmp = place / "lib" / "libiomp5.so"
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    wanted = [allocator or "", str(openmp) if openmp.exists() else ""]
    return found | {"LD_PRELOAD": ":".join(filter(None, wanted))}


def read_bandwidth(program: Path, threads: int) -> float:
    """GB/s, median of two seconds."""
    command = [str(program), "1", str(threads), "2"]
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    )


def read_files(model: Path) -> None:
    """All forms of the model, into the file cache."""
    for place in model.parent.glob(f"{model.name}*"):
        for path in [place] if place.is_file() else place.rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(1 << 24):
                        pass


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


def figure_of(row: str) -> tuple[str, str]:
    """(figure that counts in a row of work, its unit)."""
    kind = row.split()[0]
    figure = {"decode": "decode_tok_s", "prefill": "prefill_tok_s"}.get(kind, "wall_s")
    return figure, "s" if figure == "wall_s" else "tok/s"


def lead_of(values: dict[str, float], unit: str) -> float | None:
    """How many times better ours is than the best of the others; None where one side is missing."""
    others = [value for name, value in values.items() if name != OURS]
    if OURS not in values or not others:
        return None
    return values[OURS] / max(others) if unit == "tok/s" else min(others) / values[OURS]


def table(summary: dict[str, Any]) -> str:
    """Markdown: a line per row of work, then memory and start; a column per engine, ours over the
    best of the others."""
    names, medians = list(summary["engines"]), summary["medians"]
    about = summary["engines"]
    lines: list[tuple[str, str, dict[str, float]]] = []
    for row in summary["rows"]:
        figure, unit = figure_of(row)
        lines.append((row, unit, {name: medians[name][row][figure] for name in names}))
        if row == "decode 32":
            peaks = {name: medians[name][row]["peak_bytes"] / 1e9 for name in names}
            lines.append(("peak memory, decode 32", "GB", peaks))
    for what, fact in (("load", "load_s"), ("start to first token", "start_to_first_token_s")):
        lines.append((what, "s", {name: about[name][fact] for name in names}))
    shown = [f"| {summary['weights']} weights | " + " | ".join(names) + " | ratio |"]
    shown.append("|---|" + "---:|" * (len(names) + 1))
    for what, unit, values in lines:
        lead = lead_of(values, unit)
        cells = " | ".join(f"{values[name]:,.1f}" for name in names)
        shown.append(f"| {what}, {unit} | {cells} | {'' if lead is None else f'{lead:.2f}'} |")
    return "\n".join(shown)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "peers")
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a folder below PEERS/models")
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16")
    parser.add_argument("--engines", default=",".join(ENGINES), help="ours first")
    parser.add_argument(
        "--rows",
        help=f"of: {'; '.join(ROWS)} (default: all; quantised: {'; '.join(QUANTISED_ROWS)})",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="everything as JSON")
    args = parser.parse_args()
    usual = ROWS if args.weights == "bfloat16" else QUANTISED_ROWS
    args.rows = [row.strip() for row in args.rows.split(";")] if args.rows else list(usual)
    args.engines = args.engines.split(",")
    for given, known in ((args.rows, ROWS), (args.engines, ENGINES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"there is no {unknown[0]!r}; there are: {'; '.join(known)}")
    return args


def start(
    args: argparse.Namespace, folder: Path, engines: list[Engine], left_out: dict[str, str]
) -> None:
    """Adds every engine that can be compared to `engines`, stopped; else why not to `left_out`."""
    for name in args.engines:
        place = ENGINES[name]
        python = Path(sys.executable) if place is None else args.peers / place / "bin/python"
        model, log = args.peers / "models" / args.model, folder / f"{name}.log"
        try:
            if name in ONLY_BFLOAT16 and args.weights != "bfloat16":
                raise RuntimeError(f"it is run in bfloat16 only, not with {args.weights} weights")
            if not python.exists():
                raise RuntimeError(f"there is no {python}")
            read_files(model)
            engine = Engine(name, python, model, args.threads, args.weights, log)
        except RuntimeError as error:
            left_out[name] = str(error)
            print(f"{name}: not compared, {error}", flush=True)
            continue
        engines.append(engine)
        engine.stop()
        print(name, engine.about, flush=True)


def measure(
    args: argparse.Namespace, engines: list[Engine], reader: Path
) -> tuple[dict[str, dict[str, list[dict[str, float]]]], list[float]]:
    """-> figures by engine and row, one per round; read bandwidth in between."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {engine.name: {} for engine in engines}
    bandwidth: list[float] = []
    for turn in range(args.rounds):
        bandwidth.append(read_bandwidth(reader, args.threads))
        for number, row in enumerate(args.rows):
            for engine in engines:
                found = engine.run(row, 100 * turn + number)
                if "error" in found:
                    raise RuntimeError(f"{engine.name}, {row}: {found['error']}")
                runs[engine.name].setdefault(row, []).append(found)
                shown = {k: round(v, 2) for k, v in found.items() if k != "peak_bytes"}
                print(turn, row, engine.name, shown, flush=True)
        bandwidth.append(read_bandwidth(reader, args.threads))
    return runs, bandwidth


def main() -> None:
    args = parse()
    engines: list[Engine] = []
    left_out: dict[str, str] = {}
    limits: dict[str, float] = {}
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        reader = build_reader(Path(folder))
        try:
            start(args, Path(folder), engines, left_out)
            if not engines:
                raise SystemExit("no engine could be started; why stands above")
            if args.weights == "bfloat16":
                limits = matmul_rate(args.peers / "models" / args.model, args.threads)
            runs, bandwidth = measure(args, engines, reader)
        finally:
            for engine in engines:
                engine.close()
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "model": args.model,
        "weights": args.weights,
        "threads": args.threads,
        "load_before": busy,
        "engines": {engine.name: engine.about for engine in engines},
        "left_out": left_out,
        "limits": {"read GB/s": statistics.median(bandwidth)} | limits,
        "rows": args.rows,
        "medians": {
            name: {row: medians(found) for row, found in rows.items()}
            for name, rows in runs.items()
        },
        "rounds": runs,
    }
    print(json.dumps(summary["limits"]), table(summary), sep="\n")
    if args.output:
        args.output.write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
