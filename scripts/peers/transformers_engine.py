"""Hugging Face transformers, plain or with weights quantized by torchao or optimum-quanto, in bf16 and eager mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from peers.protocol import Order, StepEngine, mean_loss, serve


def quantize_torchao(model: torch.nn.Module, bits: int) -> None:
    """Quantize every linear's weight, the head's too."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    # this torchao has no int4 kernel for x86: its Int4WeightOnlyConfig asks for CUDA, and this one multiplies in bf16
    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))  # type: ignore[attr-defined]
    quantize_(model, Int8WeightOnlyConfig() if bits == 8 else int4)


def quantize_quanto(model: torch.nn.Module, bits: int) -> None:
    """Quantize every linear's weight, the head's too."""
    from optimum.quanto import freeze, qint4, qint8, quantize

    quantize(model, weights=qint8 if bits == 8 else qint4)
    freeze(model)


QUANTIZERS = {"torchao": quantize_torchao, "quanto": quantize_quanto}


class Transformers(StepEngine):
    """One checkpoint in bf16, quantized after loading."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self.order = order
        self.library = order.options.get("library")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(order.weights, dtype=torch.bfloat16)
        self.model.eval()
        if self.library:
            QUANTIZERS[self.library](self.model, order.options["bits"])
        self.cache: Any = None

    def info(self) -> dict[str, Any]:
        """See `Engine.info`."""
        from importlib.metadata import version

        names = ["transformers", "torch", *({"torchao": ["torchao"], "quanto": ["optimum-quanto"]}.get(self.library or "", []))]
        entries, bits = self.order.options["parameters"], self.order.options["bits"]
        step = entries["step"] * bits // 8 + (entries["step"] // 128 * 4 if bits == 4 else 0)
        table = 2 * (entries["all"] - entries["step"])
        return {
            "version": ", ".join(f"{name} {version(name)}" for name in names),
            "head": self.order.options["head"],
            "bytes": step + table,
            "step_bytes": step,
            "settings": {"dtype": "bf16", "mode": "eager"},
        }

    def run(self, tokens: list[int], keep: int) -> torch.Tensor:
        """Append tokens to the cache; returns the logits [keep or all, vocab] of the last."""
        with torch.inference_mode():
            output = self.model(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        self.cache = output.past_key_values
        found: torch.Tensor = output.logits[0]
        return found

    def start(self, tokens: list[int], room: int) -> np.ndarray:
        """See `StepEngine.start`."""
        del room  # the cache grows
        self.cache = None
        return self.run(tokens, 1)[-1].float().numpy()

    def step(self, token: int) -> np.ndarray:
        """See `StepEngine.step`."""
        return self.run([token], 1)[-1].float().numpy()

    def score(self, tokens: list[int]) -> float:
        """See `Engine.score`."""
        self.cache = None
        return mean_loss(self.run(tokens, 0).float().numpy(), tokens, self.order.threads)


if __name__ == "__main__":
    serve(Transformers)
