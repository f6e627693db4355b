"""Scoring behind a KV cache: without loss it changes no bit, with int8 it is what serving token by token computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmq.calibration.corpus import text_from_string
from llmq.errors import UsageError
from llmq.evaluation.divergence import evaluate_divergence
from llmq.evaluation.perplexity import evaluate_perplexity
from llmq.evaluation.protocols import Windows
from llmq.evaluation.scoring import Batching
from llmq.evaluation.through_cache import ThroughCache, scored_with
from llmq.model.generate import decode_step, prefill
from llmq.model.kv_cache import KVCache, dequantize_int8, quantize_int8
from llmq.model.llama import Llama

TEXT = text_from_string(
    "The tide is a rise and fall of the sea, caused by the pull of the Moon. " * 6, name="tides", origin="test"
)


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(5))


def copy_of(llama: Llama, dtype: torch.dtype, **changes: Any) -> Llama:
    model = Llama(dataclasses.replace(llama.config, **changes))
    model.load_state_dict(llama.state_dict())
    return model.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_the_models_dtype_changes_no_bit(llama: Llama, dtype: torch.dtype, window: int | None) -> None:
    model = copy_of(llama, dtype, sliding_window=window, sliding_layers=() if window is None else (1,))
    through = ThroughCache(model, dtype)
    for batch, length in ((3, 20), (3, 20), (1, 48), (2, 1)):
        tokens = tokens_of(batch, length)
        assert torch.equal(through.head(through.hidden(tokens)), model(tokens))
    assert scored_with(model, dtype) is model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_a_fake_quantization_of_keys_and_values(
    llama: Llama, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(llama, dtype)
    tokens = tokens_of(3, 20)
    found = ThroughCache(model, torch.int8).hidden(tokens)

    def quantized(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        k, v = (dequantize_int8(*quantize_int8(x)).to(x.dtype) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr("llmq.model.llama.F.scaled_dot_product_attention", quantized)
    expected = model.hidden(tokens)  # without any cache
    assert torch.equal(found, expected)
    monkeypatch.undo()
    assert not torch.equal(found, model.hidden(tokens))


def test_scores_are_those_of_serving_token_by_token(llama: Llama) -> None:
    through = scored_with(llama, torch.int8)
    tokens = tokens_of(2, 48)  # all of the context
    scored = through.head(through.hidden(tokens))
    cache = KVCache(llama.config, 2, 48, torch.int8, "cpu")
    served = [prefill(llama, cache, tokens[:, :5])]
    served += [decode_step(llama, cache, tokens[:, position : position + 1], position) for position in range(5, 48)]
    difference = (torch.cat(served, 1) - scored[:, 4:]).abs().max()
    effect = (scored - llama(tokens)).abs().max()
    assert difference < effect / 5  # sums of other shapes, and codes that they move by one


def test_no_window_reads_what_an_earlier_one_left(llama: Llama) -> None:
    through = ThroughCache(llama, torch.int8)
    first, second = tokens_of(2, 24).split(1)
    expected = through.hidden(second)
    through.hidden(first)
    assert torch.equal(through.hidden(second), expected)
    longer = ThroughCache(llama, torch.int8)
    longer.hidden(tokens_of(1, 48))
    assert torch.equal(longer.hidden(second), expected)


def test_windows_of_the_whole_context_and_one_token_more(llama: Llama, chars: Any) -> None:
    result = evaluate_perplexity(scored_with(llama, torch.int8), chars, TEXT, Windows(length=48))
    assert result.n_windows == 9
    assert scored_with(llama, torch.int8).hidden(tokens_of(1, 48)).isfinite().all()
    with pytest.raises(UsageError, match=r"windows of 49 tokens, but the model reads at most 48"):
        evaluate_perplexity(scored_with(llama, torch.int8), chars, TEXT, Windows(length=49))
    with pytest.raises(UsageError, match=r"49 tokens are beyond the model's context of 48 tokens"):
        scored_with(llama, torch.int8).hidden(tokens_of(1, 49))


def test_divergence_of_a_cache_from_none(llama: Llama, chars: Any) -> None:
    def kl(dtype: torch.dtype) -> float:
        result = evaluate_divergence(
            llama,
            scored_with(llama, dtype),
            chars,
            TEXT,
            Windows(length=32),
            batching=Batching(tokens=64),
        )
        return result.kl_mean.value

    assert kl(torch.float32) == 0
    assert 0 < kl(torch.bfloat16) < kl(torch.int8) < 0.05
