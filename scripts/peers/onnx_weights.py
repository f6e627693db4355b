"""Write a Hugging Face checkpoint as ONNX with onnxruntime-genai's model builder, int4 in groups of 128, head included.

python -m peers.onnx_weights CHECKPOINT OUT int4
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

OPTIONS = ("block_size=128", "accuracy_level=4", "is_symmetric=true", "hf_token=false")
"""Accuracy level 4 multiplies int8 activations, the fastest; the group is llmq's default."""


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description="Write ONNX.")
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("kind", choices=["int4"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        places = ["-m", "bench_peers", "-i", options.checkpoint, "-o", options.out, "-c", cache]
        subprocess.run([*builder, *places, "-p", options.kind, "-e", "cpu", "--extra_options", *OPTIONS], check=True)


if __name__ == "__main__":
    main()
