"""ONNX Runtime GenAI: a Generator, driven one token at a time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai

from peers.protocol import Order, StepEngine, serve


class Onnx(StepEngine):
    """One folder that onnxruntime-genai's model builder wrote."""

    def __init__(self, order: Order) -> None:
        config = onnxruntime_genai.Config(str(order.weights))
        threads = {"session_options": {"intra_op_num_threads": order.threads}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self.model = onnxruntime_genai.Model(config)
        self.order = order
        self.generator: Any = None

    def info(self) -> dict[str, Any]:
        """See `Engine.info`."""
        total = sum(path.stat().st_size for path in self.order.weights.glob("*.onnx*"))
        entries = self.order.options["parameters"]
        # the embedding table stays in fp32, everything else is in groups of 4 bits
        table = 4 * (entries["all"] - entries["step"])
        return {
            "version": onnxruntime_genai.__version__,
            "head": self.order.options["head"],
            "bytes": total,
            "step_bytes": total - table,
            "settings": {"accuracy_level": 4, "kv_cache": "f32"},
        }

    def start(self, tokens: list[int], room: int) -> np.ndarray:
        """See `StepEngine.start`."""
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, min_length=0, max_length=len(tokens) + room + 1)
        self.generator = onnxruntime_genai.Generator(self.model, params)
        self.generator.append_tokens(np.array([tokens], dtype=np.int32))
        return self.last()

    def step(self, token: int) -> np.ndarray:
        """See `StepEngine.step`."""
        self.generator.append_tokens(np.array([[token]], dtype=np.int32))
        return self.last()

    def last(self) -> np.ndarray:
        """Return the logits [vocab] of the last token."""
        found: np.ndarray = self.generator.get_logits().reshape(-1, self.order.options["vocab"])[-1]
        return found


if __name__ == "__main__":
    serve(Onnx)
