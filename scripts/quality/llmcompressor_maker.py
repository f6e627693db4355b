"""GPTQ and AWQ as llm-compressor has them. Runs in the environment `llmcompressor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

from quality.exchange import Made, Order, group_bits, hand_over, timed, versions_of
from quality.torch_model import linears, load, state, windows


def main() -> None:
    """Quantize as the order says: method (gptq or awq), bits, group_size, sym, and what the modifier takes beyond."""
    order = Order.read()
    model, tokens = load(order), windows(order)
    settings = dict(order.settings)
    method, bits, group, sym = (settings.pop(name) for name in ("method", "bits", "group_size", "sym"))
    args: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group", "group_size": group}
    args |= {"actorder": settings.pop("actorder")} if "actorder" in settings else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    kind = {"gptq": GPTQModifier, "awq": AWQModifier}[method]
    recipe = kind(ignore=["lm_head"], config_groups={"group_0": scheme}, **settings)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    # AWQ pins its inputs for faster copies to a GPU, which raises where there is none
    IntermediatesCache.pin_memory = lambda *_, **__: None
    with timed() as cost:
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            batch_size=8,
        )
    dense: dict[str, torch.Tensor] = {}
    for name, module in linears(model).items():
        held: Any = module
        weights = held.quantization_scheme.weights
        zero = getattr(held, "weight_zero_point", None)
        dense[name] = fake_quantize(held.weight, held.weight_scale, zero, weights)
    stored = group_bits(bits, group, zero=0 if sym else bits)
    made = Made(stored, cost, versions_of("llmcompressor", "compressed-tensors", "torch", "transformers"), order.settings)
    hand_over(Path(order.out), state(model, dense), made)


if __name__ == "__main__":
    main()
