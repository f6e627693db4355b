"""A small Llama with grouped queries and biases, and what a walk would hand to block-wise methods of one of its blocks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Llama]:
    """Return a function that builds one: norms and biases are not trivial, a few channels are outliers."""

    def build(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Llama:
        model = Llama(LlamaConfig(**(SHAPE | changes))).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if "norm" in name:
                    value = (1 + 0.5 * noise).to(torch.bfloat16)
                    value[3] *= 16
                elif "embed" in name:
                    value = noise
                else:
                    value = noise * (0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5)
                parameter.copy_(value.to(torch.bfloat16).to(dtype))
        return model

    return build


@pytest.fixture(scope="session")
def block_work() -> Callable[..., Any]:
    """Return a function that gathers of block `layer` what `llmq.schemes.block.BlockWork` has, as plain attributes."""

    def gather(model: Llama, layer: int = 0, batches: int = 4, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        block = model.blocks[layer]
        with torch.no_grad():
            tokens = torch.randint(model.config.vocab_size, (batches, 3, 24), generator=generator)
            inputs = [model.embed(batch) for batch in tokens]
            context = model.context(inputs[0])
            for before in model.blocks[:layer]:
                inputs = [before(h, context) for h in inputs]
            targets = [block(h, context) for h in inputs]
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        return SimpleNamespace(
            module=block, linears=linears, inputs=inputs, targets=targets, run=lambda h: block(h.to(model.dtype), context)
        )

    return gather
