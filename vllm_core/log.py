"""The project's loggers: one tree below "vllm_core", quiet unless asked.

Knows: the level. Does not know: who logs.
"""

from __future__ import annotations

import logging

from vllm_core import envs
from vllm_core.errors import InvalidArgument

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; a library never configures handlers, `configure` is for our
    commands."""
    return logging.getLogger(name)


def configure(level: str | None = None) -> None:
    """Sends the project's log to stderr; for commands, never called by the library."""
    logger = logging.getLogger("vllm_core")
    wanted = level or envs.log_level()
    if wanted not in LEVELS:
        raise InvalidArgument(
            f"VLLM_CORE_LOG_LEVEL must be one of {', '.join(LEVELS).lower()}, not {wanted.lower()}"
        )
    logger.setLevel(wanted)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
