"""A model whose calls of a few tokens attend in the fused kernel, in Triton's interpreter or on a GPU, beside SDPA's."""

from __future__ import annotations

import pytest
import torch

from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.ops import decode_attention, triton_support
from llmq.ops.schema import SUPPORTED

DTYPE = torch.float32


def build(device, window=None):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64,
        sliding_window=window, sliding_layers=(0,) if window else (),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(config).to(DTYPE).eval().requires_grad_(requires_grad=False)


def decode(model, cache_dtype, start_of):
    """The logits of a prompt of 9, then of 1, 3 and 1 tokens."""
    tokens = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(1)).to(model.device)
    cache, at, logits = KVCache(model.config, 2, 40, cache_dtype, model.device), 0, []
    for count in (9, 1, 3, 1):
        logits.append(model(tokens[:, at : at + count], cache, start_of(at)))
        at += count
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_logits_are_sdpas(triton_device, monkeypatch, cache_dtype, window, on_device):
    model = build(triton_device, window)
    start_of = (lambda at: torch.tensor([at], device=triton_device)) if on_device else (lambda at: at)
    expected = decode(model, cache_dtype, start_of)
    monkeypatch.setattr(triton_support, "triton_gpu", lambda: SUPPORTED)
    monkeypatch.setattr(decode_attention, "self_test", lambda *arguments: SUPPORTED)
    assert model.fuse_attention().ok
    assert model.fused_caches == {torch.float32, torch.int8}
    calls = []
    kernels = triton_support.load("attention")
    own = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda q, *rest: calls.append(q.shape[2]) or own(q, *rest))
    logits = decode(model, cache_dtype, start_of)
    assert calls == [9, 9, 1, 1, 3, 3, 1, 1]  # two layers
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_sdpa_attends_where_the_kernel_cannot(triton_device):
    model = build(triton_device)
    if triton_device == "cpu":
        assert not model.fuse_attention().ok
        assert model.fused_caches == frozenset()
    model.fused_caches = frozenset({torch.int8})
    cache = KVCache(model.config, 1, 40, torch.float32, triton_device)
    context = model.context(torch.zeros(1, 1, 32, device=triton_device), cache, 3)
    assert context.position is None
    assert context.full.stop == 4
