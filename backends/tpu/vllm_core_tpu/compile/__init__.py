"""Compiles the backend's kernels and whole steps by the real TPU compiler, without a TPU:
`python -m vllm_core_tpu.compile`. Needs libtpu, which runs on any Linux machine.
"""
