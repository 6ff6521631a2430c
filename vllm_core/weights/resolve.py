"""Finds the files of a model by its name: config, tokenizer and weights.

Knows: directories, GGUF files, hub ids, the demo model. Does not know: what a config means.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_core.errors import InvalidArgument, ModelError
from vllm_core.log import get_logger
from vllm_core.weights.demo import ensure_demo_model
from vllm_core.weights.source import WeightSource, open_safetensors, safetensors_files

if TYPE_CHECKING:
    from transformers import AutoConfig, PretrainedConfig

logger = get_logger(__name__)

DEMO = "demo"

_LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt")
_NOT_WANTED = ("*/*", "consolidated*", "training_args*", "trainer_state*", "optimizer*")
"""Weights in other formats and other people's run files, in subfolders mostly."""


@dataclass(frozen=True)
class ModelFiles:
    """Everything about a model that can be known before its weights are read."""

    name: str
    """As the user wrote it."""
    config: PretrainedConfig
    generation_config: dict[str, Any]
    """generation_config.json as it is; `eos_token_id` may be a number or a list."""
    tokenizer: Path
    """A directory or a GGUF file."""
    open_weights: Callable[[], WeightSource]
    load_format: str
    """safetensors, gguf or dummy; a dummy model has no weights to open."""
    num_weight_bytes: int | None
    """Bytes of the checkpoint; None for a dummy model."""


def resolve(
    model: str,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    tokenizer: str | None = None,
) -> ModelFiles:
    """The files of "demo", a directory, a `.gguf` file or a hub id ("org/name").

    Raises ModelError when something is not there or cannot be read, with its close neighbours.
    """
    if load_format not in _LOAD_FORMATS:
        raise InvalidArgument(
            f"load_format must be one of {', '.join(_LOAD_FORMATS)}, not {load_format!r}"
        )
    try:
        path = _locate(model, revision, with_weights=load_format != "dummy")
        text = None if tokenizer is None else _locate(tokenizer, None, with_weights=False)
        if path.is_file():
            return _from_gguf(model, path, load_format, text)
        return _from_directory(model, path, load_format, text)
    except OSError as error:  # a folder that may not be entered, a name longer than a path may be
        raise ModelError(f"cannot read model {model!r:.80}: {error.strerror or error}") from error


def _from_directory(name: str, folder: Path, load_format: str, text: Path | None) -> ModelFiles:
    ggufs = sorted(folder.glob("*.gguf"))
    if load_format == "gguf" or (load_format == "auto" and not _has_safetensors(folder) and ggufs):
        if len(ggufs) != 1:
            found = ", ".join(path.name for path in ggufs) or "none"
            raise ModelError(
                f"{folder} must hold one GGUF file to be used as a model, found: {found}; "
                "name the file itself"
            )
        return _from_gguf(name, ggufs[0], load_format, text)
    config = _read_config(folder)
    generation_config = _read_generation_config(folder)
    if load_format == "dummy":
        return ModelFiles(
            name,
            config,
            generation_config,
            text or folder,
            partial(_no_weights, name),
            "dummy",
            None,
        )
    source = open_safetensors(folder)
    return ModelFiles(
        name,
        config,
        generation_config,
        text or folder,
        lambda: source,
        "safetensors",
        source.num_bytes(),
    )


def _from_gguf(name: str, path: Path, load_format: str, text: Path | None) -> ModelFiles:
    from vllm_core.weights.gguf import GGUFFile

    if load_format == "safetensors":
        raise ModelError(f"{path} is a GGUF file, but load_format is safetensors; use auto or gguf")
    file = GGUFFile(path)
    is_dummy = load_format == "dummy"
    return ModelFiles(
        name,
        _make_config(
            f"the config of {path}",
            file.config(),
            lambda config, fields: config.for_model(**fields),
        ),
        file.generation_config(),
        text or path,
        partial(_no_weights, name) if is_dummy else lambda: file,
        "dummy" if is_dummy else "gguf",
        None if is_dummy else file.num_bytes(),
    )


def _no_weights(name: str) -> WeightSource:
    raise ModelError(f"{name} was opened with load_format dummy, which reads no weights")


def _has_safetensors(folder: Path) -> bool:
    return bool(safetensors_files(folder)) or any(folder.glob("*.safetensors.index.json"))


def _locate(model: str, revision: str | None, *, with_weights: bool) -> Path:
    """A directory or a GGUF file on this machine."""
    if model == DEMO:
        return ensure_demo_model(logger.warning)
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise ModelError(f"unknown model {model!r}: {error}") from error
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is neither a directory nor a GGUF file")
        return path
    is_path = path.is_absolute() or model.startswith(".") or path.suffix.lower() == ".gguf"
    near = _neighbours(path)
    if is_path or near or not _HUB_ID.fullmatch(model):
        raise ModelError(_unknown(model, near))
    return _download(model, revision, with_weights=with_weights)


def _neighbours(path: Path) -> list[str]:
    """What lies in the same folder under a similar name."""
    try:
        there = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, there)]


def _unknown(model: str, near: Sequence[str]) -> str:
    near = [*difflib.get_close_matches(model, [DEMO]), *near]
    hint = f"did you mean {' or '.join(near)}?" if near else "no such file or directory"
    return (
        f"unknown model {model!r}: {hint} "
        f'(wanted: a directory, a .gguf file, a hub id such as "org/name", or "{DEMO}")'
    )


def _download(model: str, revision: str | None, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*_TEXT_FILES, "*.safetensors"] if with_weights else list(_TEXT_FILES)
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=wanted, ignore_patterns=list(_NOT_WANTED)
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{model} is gated on the hub: accept its terms there and log in with hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub knows no model {model!r}; check its name, or log in if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model} has no revision {revision!r} on the hub") from error
    except HFValidationError as error:
        raise ModelError(f"{model!r} is no valid hub id: {error}") from error
    except Exception as error:  # the client lets through what its transport raises
        raise ModelError(
            f"cannot download {model} from the hub, and it is not in the local cache; check the "
            "network, or give a directory or a GGUF file"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return found


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no config.json and no single GGUF file: it is no model")
    return _make_config(
        str(path),
        _read_json(path),
        lambda config, fields: config.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        ),
    )


def _read_generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _read_json(path) if path.is_file() else {}


def _make_config(
    where: str,
    fields: dict[str, Any],
    make: Callable[[type[AutoConfig], dict[str, Any]], PretrainedConfig],
) -> PretrainedConfig:
    """The config object; code that a checkpoint brings along (`auto_map`) is never run."""
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{where} has no model_type")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()))
        hint = f"did you mean {' or '.join(near)}?" if near else "transformers does not know it"
        raise ModelError(f"{where} has an unknown model_type {model_type!r}: {hint}")
    try:
        return make(AutoConfig, fields)
    except Exception as error:  # config classes check themselves and raise what they like
        reason = " ".join(str(error).split())
        raise ModelError(f"{where} is not accepted by transformers: {reason}") from error
