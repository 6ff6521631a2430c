"""The CPU backend of vllm-core. Importing it imports no framework."""

__version__ = "0.1.0"
