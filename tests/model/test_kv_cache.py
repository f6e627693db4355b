"""KVCache: what it allocates, what a step reads of it, and that nothing beyond the present position is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama


def test_bytes(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 5, 24, torch.bfloat16, "cpu")
    assert cache.nbytes == 3 * 2 * 5 * 2 * 24 * 8 * 2  # layers, keys and values, batch, kv heads, length, head_dim, bytes
    assert cache.nbytes_read(24) == cache.nbytes
    assert cache.nbytes_read(7) == cache.nbytes * 7 // 24
    assert cache.keys[0].shape == (5, 2, 24, 8)


def test_sliding_layers_read_no_more_than_their_window(tiny_config: LlamaConfig) -> None:
    config = dataclasses.replace(tiny_config, sliding_window=10, sliding_layers=(0, 2))
    cache = KVCache(config, 1, 24, torch.float32, "cpu")
    per_token = 2 * 2 * 8 * 4
    assert cache.nbytes_read(6) == 3 * 6 * per_token
    assert cache.nbytes_read(20) == (20 + 2 * 10) * per_token


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (1, 41, "41 tokens are beyond the model's context of 40 tokens .*at most 40"),
        (0, 8, "positive batch size and length, got 0 and 8"),
        (1, 0, "positive batch size and length, got 1 and 0"),
    ],
)
def test_sizes_that_cannot_be(tiny_config: LlamaConfig, batch: int, length: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KVCache(tiny_config, batch, length, torch.float32, "cpu")


@pytest.mark.parametrize("start", [int, torch.tensor], ids=["int", "tensor"])
def test_nothing_beyond_the_present_is_read(
    make: Callable[[LlamaConfig], Llama], tiny_config: LlamaConfig, tokens: Tensor, start: Callable[[int], int | Tensor]
) -> None:
    model = make(dataclasses.replace(tiny_config, sliding_window=5, sliding_layers=(1,)))
    fresh, used = (KVCache(model.config, 2, 24, torch.float32, "cpu") for _ in range(2))
    for tensor in (*used.keys, *used.values):
        tensor.fill_(1e4)  # as a longer text would have left behind
    for cache in (fresh, used):
        model(tokens[:, :10], cache, start(0))
    assert torch.equal(model(tokens[:, 10:11], fresh, start(10)), model(tokens[:, 10:11], used, start(10)))


def test_reset_forgets_even_nan(make: Callable[[LlamaConfig], Llama], tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config)
    cache = KVCache(tiny_config, 2, 24, torch.float32, "cpu")
    expected = model(tokens[:, :1], cache, torch.tensor(0))
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    assert model(tokens[:, :1], cache, torch.tensor(0)).isnan().any()  # 0 * NaN: why a cache begins as zeros
    cache.reset()
    assert torch.equal(model(tokens[:, :1], cache, torch.tensor(0)), expected)
