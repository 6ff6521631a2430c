"""llama.cpp, for a comparison: its server over HTTP on this machine, token ids in, a stream out.

Runs in the environment whose folder holds the build (`build/bin/llama-server`); needs the standard
library only.

Knows: llama-server. Does not know: other engines.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from work import Run, Stamps, die_with_parent, serve

PROGRAM = Path(sys.prefix) / "build" / "bin" / "llama-server"
FILES = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_k_m"}
KV = {"bfloat16": ("bf16", "f16"), "int8": ("f16",), "int4": ("f16",)}
"""What the cache holds: the first that the server takes; f16 is its default."""
SLOTS = 32
CONTEXT = 40_960
"""Tokens of the cache that all slots share: 32 requests of 1,056 and some to spare."""


def load(folder: str, threads: int, weights: str) -> tuple[dict[str, Any], Run]:
    """A server with one cache for all slots, flash attention on."""
    model = Path(f"{folder.rstrip('/')}-{FILES[weights]}.gguf")
    if not model.exists():
        raise SystemExit(f"{model} is not there: llama-quantize writes it from the bf16 one")
    for kv in KV[weights]:
        port = start(model, threads, kv)
        if port is not None:
            break
    else:
        raise SystemExit("llama-server did not start; what it said stands above")

    def run(prompts: list[list[int]], count: int) -> Stamps:
        stamps: Stamps = [[] for _ in prompts]
        askers = [
            threading.Thread(target=ask, args=(port, prompt, count, own))
            for prompt, own in zip(prompts, stamps, strict=True)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        return stamps

    version = subprocess.run(
        [str(PROGRAM), "--version"], capture_output=True, text=True, check=True
    )
    about = {
        "version": (version.stdout + version.stderr).split("\n")[0].removeprefix("version: "),
        "weights": FILES[weights],
        "compute": "its default",
        "kv": kv,
    }
    return about, run


def start(model: Path, threads: int, kv: str) -> int | None:
    """-> port of a server that is ready; None: it ended. It dies with this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    options: dict[str, Any] = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": port,
        "--threads": threads,
        "--threads-batch": threads,
        "--parallel": SLOTS,
        "--ctx-size": CONTEXT,
        "--flash-attn": "on",
        "--cache-type-k": kv,
        "--cache-type-v": kv,
        "--cache-ram": 0,  # no prompt comes twice: copies of finished ones would only cost time
    }
    command = [str(PROGRAM), "--kv-unified", "--no-warmup", "--no-webui"]
    command += [str(word) for pair in options.items() for word in pair]
    server = subprocess.Popen(command, stdout=sys.stderr, preexec_fn=die_with_parent)
    while server.poll() is None:
        time.sleep(0.02)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return port
        except OSError:
            continue
        finally:
            connection.close()
    return None


def ask(port: int, prompt: list[int], count: int, stamps: list[float]) -> None:
    """Stamps each token as it comes. A token that ends inside of a character is held back by the
    server: it gets the stamp of the next message, which counts it."""
    body = {
        "prompt": prompt,
        "n_predict": count,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "response_fields": ["tokens_predicted"],
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request(
        "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
    )
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            now = time.perf_counter()
            told = json.loads(line[6:])
            if "tokens_predicted" not in told:
                raise RuntimeError(f"llama-server: {told}")
            stamps += [now] * (told["tokens_predicted"] - len(stamps))
    connection.close()


if __name__ == "__main__":
    serve("llama.cpp", load, sys.argv[1:])
