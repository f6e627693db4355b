"""What both files of checks need: the device, a tiny Llama, and the attention that every device has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated_device import EMULATED, register
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmq.calibration.recorder import CalibrationInfo, CalibrationSet
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register the device; attention is made of plain products, since torch's own for the CPU is for the CPU alone."""
    register()
    monkeypatch.setattr("llmq.api.loading.DEVICES", ("cpu", "cuda", EMULATED))
    with sdpa_kernel(SDPBackend.MATH):
        yield EMULATED


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Llama]:
    """Return a function that builds a model of random weights, a few channels of whose norms are outliers."""

    def build(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Llama:
        model = Llama(LlamaConfig(**(SHAPE | changes))).to(dtype).eval().requires_grad_(requires_grad=False)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.5 * noise
                noise[3] *= 8
            elif "embed" not in name:
                noise = noise * 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(noise)
        return model

    return build


@pytest.fixture(scope="session")
def windows() -> CalibrationSet:
    """Nine windows of twelve tokens."""
    tokens = torch.randint(61, (9, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return CalibrationSet(tokens, CalibrationInfo("text", "t", "a", "b", 9, 12, 0, False, 1, 108))
