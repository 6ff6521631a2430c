"""The conformance suite: one judge for every backend."""

__version__ = "0.1.0"

REQUIREMENTS = "2026.1"
"""The frozen set of scored cases that a badge speaks of; later cases run unscored first."""
