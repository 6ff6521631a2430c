"""Text that a user hands in: files and the standard input, refused in words when unreadable.

Knows: UTF-8. Does not know: what the text means.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_core.errors import InvalidArgument


def read_file(option: str, path: Path) -> str:
    """The text of the file that an option names."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:  # not there, not readable, not UTF-8
        raise InvalidArgument(f"{option} {path} cannot be read: {error}") from error


def read_input() -> str:
    """All of the standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the input is not valid UTF-8 text: {error}") from error
