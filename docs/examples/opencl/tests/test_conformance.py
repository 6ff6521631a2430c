from vllm_core_conformance.pytest_plugin import conformance_tests

test_conformance = conformance_tests("opencl", profile="contract,core")
