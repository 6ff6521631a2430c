"""The architectures that the engine runs, and where the demo model is."""

from __future__ import annotations

import argparse
import json

SUMMARY = "which models can run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    from vllm_core.models.registry import known_architectures
    from vllm_core.weights.demo import demo_model_path

    architectures = known_architectures()
    path = demo_model_path()
    if args.json:
        print(json.dumps({"architectures": architectures, "demo": str(path) if path else None}))
        return 0
    print("architectures (a model's config.json names its own):")
    for architecture in architectures:
        print(f"  {architecture}")
    print(f"demo model: {path or 'not installed yet; `vllm-core chat` fetches it'}")
    return 0
