"""LlamaConfig: what config.json means, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from llmq.errors import CheckpointError
from llmq.model.config import LlamaConfig, RopeScaling

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def test_llama_31() -> None:
    config = LlamaConfig.from_hf(LLAMA_31_8B)
    assert config == LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_transformers_5_spelling_means_the_same() -> None:
    newer = without(LLAMA_31_8B, "rope_theta", "rope_scaling", "torch_dtype") | {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA_31_8B["rope_scaling"]},
    }
    assert LlamaConfig.from_hf(newer) == LlamaConfig.from_hf(LLAMA_31_8B)
    default = without(newer, "rope_parameters") | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert LlamaConfig.from_hf(default) == LlamaConfig.from_hf(without(LLAMA_31_8B, "rope_scaling"))


def test_old_spelling_of_the_scaling_type() -> None:
    config = LlamaConfig.from_hf(LLAMA_31_8B | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_llama3_without_original_context_takes_the_present_one() -> None:
    scaling = without(LLAMA_31_8B["rope_scaling"], "original_max_position_embeddings")
    config = LlamaConfig.from_hf(LLAMA_31_8B | {"rope_scaling": scaling, "max_position_embeddings": 4096})
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == 4096


def test_mistral_slides_everywhere() -> None:
    config = LlamaConfig.from_hf(MISTRAL_7B)
    assert [config.window(layer) for layer in range(4)] == [4096] * 4
    assert LlamaConfig.from_hf(MISTRAL_7B | {"sliding_window": None}).sliding_layers == ()


def test_qwen2_slides_only_when_told_and_only_above_max_window_layers() -> None:
    plain = LlamaConfig.from_hf(QWEN2_7B)
    assert (plain.attention_bias, plain.attention_output_bias, plain.mlp_bias) == (True, False, False)
    assert plain.sliding_window is None
    sliding = LlamaConfig.from_hf(QWEN2_7B | {"use_sliding_window": True})
    assert [sliding.window(layer) for layer in range(4)] == [None, None, 131072, 131072]
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    named = LlamaConfig.from_hf(QWEN2_7B | {"use_sliding_window": True, "layer_types": types})
    assert named.sliding_layers == (0, 3)
    assert LlamaConfig.from_hf(QWEN2_7B | {"use_sliding_window": True, "max_window_layers": 4}) == plain


def test_architecture_is_found_without_model_type() -> None:
    assert LlamaConfig.from_hf(without(LLAMA_31_8B, "model_type")) == LlamaConfig.from_hf(LLAMA_31_8B)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_absent_keys_mean_what_they_mean_to_transformers(family: str, transformers: ModuleType) -> None:
    sizes = {"hidden_size": 320, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 32, "vocab_size": 9}
    theirs = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}[family]
    full = getattr(transformers, theirs)(**sizes).to_dict()
    assert LlamaConfig.from_hf({"model_type": family, **sizes}) == LlamaConfig.from_hf(full)


TINY = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 4, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1}
TINY |= {"head_dim": 4, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_ids": (2,)},
        {"eos_token_ids": (2, 3)},
        {"rope_scaling": RopeScaling("linear", 2.5)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8)},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"mlp_bias": True},
        {"sliding_window": 7, "sliding_layers": (0, 1, 2)},
        {"attention_bias": True},
        {"attention_bias": True, "sliding_window": 7, "sliding_layers": (0, 2)},
        {"attention_bias": True, "sliding_window": 7, "sliding_layers": (0, 1, 2)},
    ],
)
def test_to_hf_reads_back_as_the_same(changes: dict[str, Any]) -> None:
    config = LlamaConfig(**TINY | changes)
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_output_bias": True},
        {"attention_bias": True, "mlp_bias": True},
        {"sliding_window": 7, "sliding_layers": (1,)},
    ],
)
def test_to_hf_refuses_what_no_architecture_has(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="allowed are llama, mistral and qwen2"):
        LlamaConfig(**TINY | changes).to_hf()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "'qwen3' is not supported.*Did you mean 'qwen2'.*llama, mistral, qwen2"),
        ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported; allowed is 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported; allowed are 'default', 'llama3' and"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' .* must be a number, got None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "positive factor, got -1.0"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "one flat table"),
        ({"rope_scaling": LLAMA_31_8B["rope_scaling"] | {"low_freq_factor": 4.0}}, "0 < low_freq_factor < high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_key_value_heads": 5}, "multiple of that of key-value heads, got 32 and 5"),
        ({"num_attention_heads": 31}, "without head_dim, hidden_size must be a multiple of num_attention_heads, got 4096 and 31"),
        ({"head_dim": 127}, "head_dim must be even.*127"),
        ({"num_hidden_layers": 0}, "num_layers must be positive, got 0"),
        ({"hidden_size": "4096"}, "'hidden_size' .* must be an integer, got '4096'"),
        ({"hidden_size": True}, "'hidden_size' .* must be an integer, got True"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' .* must be a number, got 'small'"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' .* must be true or false, got 1"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' .* integer or a list"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be positive or absent, got 0"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 32}, "layer_types of a mistral"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            "for each of 32 layers",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_hf(LLAMA_31_8B | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4}, "come together or not at all"),
        ({"sliding_layers": (0,)}, "come together or not at all"),
        ({"sliding_window": 4, "sliding_layers": (2, 1)}, "ascending indices below 3"),
        ({"sliding_window": 4, "sliding_layers": (3,)}, "ascending indices below 3"),
    ],
)
def test_windows_are_consistent(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig(**TINY | changes)


def test_unknown_scaling_is_refused_when_built_by_hand() -> None:
    with pytest.raises(CheckpointError, match="'ntk' is not supported"):
        RopeScaling("ntk", 2.0)  # type: ignore[arg-type]


def test_config_is_a_value() -> None:
    config = LlamaConfig(**TINY)
    assert hash(config) == hash(LlamaConfig(**TINY))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 9  # type: ignore[misc]


def test_configuration_needs_no_torch() -> None:
    code = "import sys, llmq.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
