"""The model computes what transformers computes, in fp32, for every option, however the tokens are fed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama

TOLERANCE = 1e-5  # max abs logit; fp32 against fp32, the order of sums differs

SMALL = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that the wavelengths of a head of 8 fall below, between and above
}


@dataclass(frozen=True)
class Case:
    """One configuration, and what to change to undo the option it is about (None: nothing that could be undone)."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    undo: dict[str, Any] | None = None


CASES = {
    "gqa": Case("Llama"),
    "mha": Case("Llama", {"num_key_value_heads": 6}),
    "mqa": Case("Llama", {"num_key_value_heads": 1}),
    "tied": Case("Llama", {"tie_word_embeddings": True}),
    "wide-heads": Case("Llama", {"head_dim": 16}),
    "narrow-heads": Case("Llama", {"head_dim": 6}),
    "eps": Case("Llama", {"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-5}),
    "theta": Case("Llama", {"rope_theta": 500000.0}, {"rope_theta": 10000.0}),
    "rope-llama3": Case("Llama", {"rope_scaling": LLAMA3}, {"rope_scaling": None}),
    "rope-linear": Case("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, {"rope_scaling": None}),
    "attention-bias": Case("Llama", {"attention_bias": True}),
    "mlp-bias": Case("Llama", {"mlp_bias": True}),
    "both-biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral-window": Case("Mistral", {"sliding_window": 5}, {"sliding_window": None, "sliding_layers": ()}),
    "mistral-window-1": Case("Mistral", {"sliding_window": 1}, {"sliding_window": 2}),
    "mistral-wide-window": Case("Mistral", {"sliding_window": 40, "head_dim": 16}),
    "qwen2": Case("Qwen2"),
    "qwen2-tied": Case("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-window": Case(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"sliding_layers": (0, 1, 2)},
    ),
}


@dataclass(frozen=True)
class Pair:
    """The same weights in both models, tokens, and what transformers makes of them."""

    model: Llama
    tokens: Tensor
    expected: Tensor
    case: Case


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request: pytest.FixtureRequest, transformers: ModuleType, randomize: Callable[[nn.Module], None]) -> Pair:
    case: Case = request.param
    hf_config = getattr(transformers, f"{case.family}Config")(**SMALL | case.options, attn_implementation="eager")
    reference = getattr(transformers, f"{case.family}ForCausalLM")(hf_config).eval()
    randomize(reference)
    # through the JSON that transformers would write, so that what is compared includes the reading of config.json
    config = LlamaConfig.from_hf(json.loads(hf_config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = Llama(config)
    state = {key: value for key, value in reference.state_dict().items() if not (config.tie_word_embeddings and "lm_head" in key)}
    model.load_state_dict(state, assign=True)
    tokens = torch.randint(0, 67, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference(tokens).logits
    assert 0.3 < expected.std() < 10  # of an order at which an absolute 1e-5 means something
    return Pair(model.requires_grad_(False), tokens, expected, case)


def worst(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max())


def feed(pair: Pair, sizes: list[int], start: Callable[[int], int | Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Feed the tokens in pieces through a cache; yield each piece's place and logits."""
    cache = KVCache(pair.model.config, 2, 40, torch.float32, "cpu")
    position = 0
    for size in sizes:
        place = slice(position, position + size)
        yield place, pair.model(pair.tokens[:, place], cache, start(position))
        position += size
    assert position == pair.tokens.shape[1]


def test_full_forward(pair: Pair) -> None:
    assert worst(pair.model(pair.tokens), pair.expected) <= TOLERANCE


# an option that changes the weights' shapes needs no such proof: a model that ignored it could not load them
@pytest.mark.parametrize(
    "pair", [case for case in CASES.values() if case.undo], ids=[name for name, case in CASES.items() if case.undo], indirect=True
)
def test_option_is_seen_by_this_comparison(pair: Pair) -> None:
    ignoring = Llama(dataclasses.replace(pair.model.config, **pair.case.undo or {}))
    ignoring.load_state_dict(pair.model.state_dict(), assign=True)
    with torch.no_grad():
        assert worst(ignoring(pair.tokens), pair.expected) > 100 * TOLERANCE


@pytest.mark.parametrize("start", [int, torch.tensor, lambda p: torch.tensor([p])], ids=["int", "tensor", "tensor1"])
@pytest.mark.parametrize(
    "sizes",
    [[30], pytest.param([1] * 30, marks=pytest.mark.slow), [4, 1, 1, 9, 2, 1, 12]],
    ids=["prefill", "tokens", "chunks"],
)
def test_cached(pair: Pair, sizes: list[int], start: Callable[[int], int | Tensor]) -> None:
    for place, logits in feed(pair, sizes, start):
        assert worst(logits, pair.expected[:, place]) <= TOLERANCE, place


def test_block_by_block(pair: Pair) -> None:
    h = pair.model.embed(pair.tokens)
    context = pair.model.context(h[:1])  # of another batch size: it depends on the length only
    for block in pair.model.blocks:
        h = block(h, context)
    assert worst(pair.model.head(h), pair.expected) <= TOLERANCE


def test_to_hf_is_the_same_model_to_transformers(pair: Pair, transformers: ModuleType) -> None:
    data = pair.model.config.to_hf()
    reference_class = getattr(transformers, data["architectures"][0])
    hf_config = reference_class.config_class(**data, attn_implementation="eager")
    reference = reference_class(hf_config).eval()
    reference.load_state_dict(pair.model.state_dict())
    with torch.no_grad():
        assert worst(reference(pair.tokens).logits, pair.expected) <= TOLERANCE


def test_bundled_checkpoint(demo_model: Llama, wt2_8m: Path, transformers: ModuleType) -> None:
    hf_config = transformers.LlamaConfig(**json.loads((wt2_8m / "config.json").read_text()), attn_implementation="eager")
    reference = transformers.LlamaForCausalLM(hf_config).eval().float()
    state = {key: value.float() for key, value in load_file(wt2_8m / "model.safetensors").items()}
    reference.load_state_dict(state)
    model = Llama(demo_model.config).requires_grad_(False)
    model.load_state_dict(state, assign=True)
    tokens = torch.randint(3, 4096, (2, 256), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = reference(tokens).logits
    # trained logits reach 30, so the same relative error is some ten times larger than for the random models above
    assert worst(model(tokens), expected) <= TOLERANCE * float(expected.abs().max())
    assert expected.abs().max() < 60
