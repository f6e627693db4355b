"""Export a Hugging Face checkpoint to OpenVINO with compressed weights, embedding and head included.

python -m peers.openvino_weights CHECKPOINT OUT int4
"""

from __future__ import annotations

import argparse
from typing import Any

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": True},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0, "all_layers": True},
}


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description="Export to OpenVINO.")
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("kind", choices=list(CONFIGURATIONS))
    options = parser.parse_args()
    config = OVWeightQuantizationConfig(**CONFIGURATIONS[options.kind])
    model = OVModelForCausalLM.from_pretrained(options.checkpoint, export=True, compile=False, quantization_config=config)
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
