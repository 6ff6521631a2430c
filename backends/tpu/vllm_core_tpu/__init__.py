"""vllm-core on TPUs, through JAX and Pallas."""

__version__ = "0.1.0"
