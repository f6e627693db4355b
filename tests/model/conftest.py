"""The model room's oracle (transformers), and small random models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama

TINY = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=40,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    eos_token_ids=(2,),
)


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The oracle. Its import takes seconds and warns, which is not this project's to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers as module

        # the lazy attributes import the real modules, so they are touched here
        for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
            getattr(module, name)
    return module


def _randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.7)


@pytest.fixture(scope="session")
def randomize() -> Callable[[nn.Module], None]:
    """A function that gives every parameter random values: biases of 0 and norms of 1 would hide mistakes."""
    return _randomize


@pytest.fixture
def make() -> Callable[[LlamaConfig], Llama]:
    """A function that builds a Llama of a configuration with random weights."""

    def build(config: LlamaConfig) -> Llama:
        model = Llama(config).requires_grad_(False)
        _randomize(model)
        return model

    return build


@pytest.fixture
def tiny_config() -> LlamaConfig:
    """Grouped queries, no window, context 40."""
    return TINY


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two sequences of 24 tokens of the tiny vocabulary."""
    return torch.randint(3, TINY.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def demo_model(wt2_8m: Path) -> Llama:
    """The bundled checkpoint, read here without the checkpoint room, in its own bfloat16."""
    config = LlamaConfig.from_hf(json.loads((wt2_8m / "config.json").read_text()))
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(load_file(wt2_8m / "model.safetensors"), assign=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def demo_model_fp32(demo_model: Llama) -> Llama:
    """The same weights in float32, which is also much the faster where the CPU has no bfloat16."""
    with torch.device("meta"):
        model = Llama(demo_model.config)
    model.load_state_dict({key: value.float() for key, value in demo_model.state_dict().items()}, assign=True)
    return model.requires_grad_(False)
