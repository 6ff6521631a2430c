"""A backend of vllm-core with its own paged-attention kernel in OpenCL C."""
