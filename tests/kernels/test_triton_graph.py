"""Recorded decode steps that attend in the fused kernel: positions come from the buffer, keys from a part of a longer cache."""

from __future__ import annotations

import pytest
import torch
from replaying import Again

from llmq.model.config import LlamaConfig
from llmq.model.cuda_graph import GraphLlama
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=300,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=6,
    sliding_layers=(1,),
)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_every_token_is_sdpas(triton_device, cache_dtype):
    torch.manual_seed(0)
    with torch.device(triton_device):
        model = Llama(CONFIG).requires_grad_(requires_grad=False)
    tokens = torch.randint(0, 64, (2, 132), generator=torch.Generator().manual_seed(1)).to(triton_device)
    capture = Again() if triton_device == "cpu" else None
    runner = GraphLlama(model, capture)
    mine, its = (KVCache(CONFIG, 2, 300, cache_dtype, triton_device) for _ in range(2))
    for cache in (mine, its):
        model.hidden(tokens[:, :126], cache, 0)
    for position in range(126, 132):  # over the end of a span
        model.fused_caches = frozenset()
        expected = model(tokens[:, position : position + 1], its, position)
        model.fused_caches = frozenset({torch.float32, torch.int8})
        got = runner(tokens[:, position : position + 1], mine, position)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4), position
        assert runner.reads(mine, position) == position + 1
    if capture is not None:
        assert capture.recorded == 2
