"""Bytes and FLOPs against counts done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from llmq.benchmark.traffic import Floor, StepBytes, floor, linear_shapes, traffic_of_config, traffic_of_model
from llmq.errors import ShapeError, UsageError
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama
from llmq.numerics.grid import FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor

TINY = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
BLOCK = 32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 64 * 32 + 64 * 32 + 32 * 64  # q k v o gate up down: 9216 weights
HEAD = 100 * 32
INT4 = LinearFormat(IntGrid(4, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16"))


def test_bytes_of_a_bf16_step_by_hand() -> None:
    step = traffic_of_config(TINY, {}, torch.bfloat16).decode_bytes(batch_size=3, visible=10)
    assert step == StepBytes(
        linears=2 * (2 * BLOCK + HEAD),
        vectors=2 * 5 * 32,  # two norms a layer, and the last
        embedding=3 * 32 * 2,
        kv=2 * 3 * 2 * 8 * 2 * 2 * 10,  # keys and values, sequences, heads, D, bytes, layers, tokens
    )
    assert step.total == 43264 + 320 + 192 + 3840


def test_bytes_of_an_int4_step_by_hand() -> None:
    formats = {fqn: INT4 for fqn in linear_shapes(TINY) if fqn != "lm_head"}
    traffic = traffic_of_config(TINY, formats, torch.bfloat16)
    # half a byte a weight, and a scale and a zero point of two bytes each for 32 weights
    assert traffic.linears_nbytes == 2 * (BLOCK // 2 + BLOCK // 32 * 4) + 2 * HEAD


def test_bytes_of_an_int8_cache_by_hand() -> None:
    traffic = traffic_of_config(TINY, {}, torch.bfloat16, torch.int8)
    # keys and values, sequences, heads, eight codes and a scale of four bytes, layers, tokens
    assert traffic.kv_nbytes(3, 10) == 2 * 3 * 2 * (8 + 4) * 2 * 10
    plain = traffic_of_config(TINY, {}, torch.bfloat16)
    assert traffic.decode_bytes(3, 10) == replace(plain.decode_bytes(3, 10), kv=2880)
    assert traffic.decode_flops(1, 10) == plain.decode_flops(1, 10)
    sliding = traffic_of_config(replace(TINY, sliding_window=4, sliding_layers=(1,)), {}, torch.bfloat16, torch.int8)
    assert sliding.kv_nbytes(1, 10) == 2 * 2 * 12 * (10 + 4)
    assert traffic_of_model(Llama(TINY).to(torch.bfloat16), torch.int8) == traffic


def test_flops_by_hand() -> None:
    traffic = traffic_of_config(TINY, {}, torch.float32)
    assert traffic.decode_flops(batch_size=1, visible=10) == 2 * (2 * BLOCK + HEAD) + 2 * 10 * 4 * 4 * 8
    assert traffic.decode_flops(batch_size=5, visible=10) == 5 * traffic.decode_flops(1, 10)
    # 7 tokens through the body, one through the head; they see 1 + 2 + … + 7 = 28 tokens
    assert traffic.prefill_flops(batch_size=1, length=7) == 2 * (7 * 2 * BLOCK + HEAD) + 2 * 28 * 4 * 4 * 8
    assert traffic.prefill_bytes(2, 7) == StepBytes(4 * (2 * BLOCK + HEAD), 4 * 5 * 32, 14 * 32 * 4, 0)


def test_flops_do_not_depend_on_the_packing() -> None:
    formats = dict.fromkeys(linear_shapes(TINY), INT4)
    packed, plain = traffic_of_config(TINY, formats, torch.bfloat16), traffic_of_config(TINY, {}, torch.bfloat16)
    assert packed.linears_nbytes < plain.linears_nbytes / 3
    assert packed.decode_flops(1, 10) == plain.decode_flops(1, 10)


def test_a_sliding_layer_reads_and_multiplies_no_more_than_its_window() -> None:
    sliding = replace(TINY, sliding_window=4, sliding_layers=(1,))
    traffic, full = traffic_of_config(sliding, {}, torch.bfloat16), traffic_of_config(TINY, {}, torch.bfloat16)
    assert traffic.kv_nbytes(1, 10) == full.kv_nbytes(1, 10) * (10 + 4) // 20
    assert traffic.kv_nbytes(1, 3) == full.kv_nbytes(1, 3)
    assert full.decode_flops(1, 10) - traffic.decode_flops(1, 10) == (10 - 4) * 4 * 4 * 8
    # prefill of 6: the sliding layer sees 1 2 3 4 4 4 and not 1 2 3 4 5 6
    assert full.prefill_flops(1, 6) - traffic.prefill_flops(1, 6) == 3 * 4 * 4 * 8


VARIANTS = {
    "plain": TINY,
    "tied": replace(TINY, tie_word_embeddings=True),
    "biases": replace(TINY, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "odd heads": replace(TINY, num_heads=6, num_kv_heads=1, head_dim=10),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_model_and_its_configuration_count_the_same(config: LlamaConfig, dtype: torch.dtype) -> None:
    model = Llama(config).to(dtype)
    counted = traffic_of_model(model)
    assert counted == traffic_of_config(config, {}, dtype)
    step = counted.decode_bytes(1, 5)
    stored = sum(parameter.nbytes for parameter in model.parameters())  # a tied one once
    table = 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    assert step.linears + step.vectors == stored - table
    assert step.embedding == config.hidden_size * dtype.itemsize


def test_a_quantized_model_and_its_formats_count_the_same() -> None:
    model = Llama(TINY).to(torch.bfloat16)
    formats = {fqn: INT4 for fqn in linear_shapes(TINY) if fqn != "lm_head"} | {"lm_head": LinearFormat(FloatGrid("bfloat16"))}
    grid = INT4.weight
    assert isinstance(grid, IntGrid)
    for fqn, (n, k) in linear_shapes(TINY).items():
        if fqn == "lm_head":
            weight = QuantizedWeight.from_float(torch.zeros(n, k, dtype=torch.bfloat16))
        else:
            scale = torch.ones(n, k // 32, dtype=torch.bfloat16)
            weight = QuantizedWeight.from_codes(grid, torch.zeros(n, k, dtype=torch.uint8), scale, scale.clone())
        tensor = QuantizedTensor.from_weight(weight, formats[fqn])
        model.get_submodule(fqn).weight = nn.Parameter(tensor, requires_grad=False)
    assert traffic_of_model(model) == traffic_of_config(TINY, formats, torch.bfloat16)


def test_the_floor_is_the_higher_of_two_walls() -> None:
    assert floor(10**9, 10**9, bandwidth_gbps=10.0, peak_gflops=100.0) == Floor(0.1, "bandwidth")
    assert floor(10**9, 10**12, bandwidth_gbps=10.0, peak_gflops=100.0) == Floor(10.0, "compute")
    with pytest.raises(UsageError, match="must be positive, got 0"):
        floor(1, 1, bandwidth_gbps=0.0, peak_gflops=1.0)


def test_a_format_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no linear 'model\.layers\.7\.q'"):
        traffic_of_config(TINY, {"model.layers.7.q": INT4}, torch.bfloat16)


def test_a_format_that_does_not_fit_is_refused() -> None:
    wide = LinearFormat(IntGrid(4, 128, symmetric=False, zero_point="float", scale_dtype="bfloat16"))
    with pytest.raises(ShapeError, match=r"model\.layers\.1\.mlp\.up_proj \[64, 32\] does not fit"):
        traffic_of_config(TINY, {"model.layers.1.mlp.up_proj": wide}, torch.bfloat16)


def test_the_1_1_b_shape_by_hand() -> None:
    config = LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64, 2048, 1e-5, 10000.0)
    traffic = traffic_of_config(config, {}, torch.bfloat16)
    weights = 22 * (2048 * 2048 * 2 + 2 * 256 * 2048 + 3 * 5632 * 2048) + 32000 * 2048
    assert traffic.linears_nbytes == 2 * weights == 2_068_840_448
    assert traffic.kv_nbytes(1, 1024) == 2 * 22 * 4 * 64 * 2 * 1024
