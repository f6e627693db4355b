"""Scoring a model as it serves: every key and value that a window's tokens see goes through a KV cache.

Windows are otherwise scored without a cache, which is the arithmetic of one in the model's own dtype: there, a key or value is
the same number whether it was stored or not. A cache of another dtype rounds it, and quality has to be measured behind that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.evaluation.scoring import LanguageModel
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.runtime import Runner


class ThroughCache:
    """A `LanguageModel` that reads each batch of windows from position 0 into a cache of `dtype`, and attends to that."""

    def __init__(self, model: Runner, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._cache: KVCache | None = None  # of the last batch: most batches are of one shape

    @property
    def config(self) -> LlamaConfig:
        """The model's."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self._model.device

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [B, T] to the residual stream [B, T, hidden].

        Raises:
            UsageError: T is beyond the model's context.
        """
        B, T = tokens.shape
        cache = self._cache
        if cache is None or (cache.batch_size, cache.max_length) != (B, T):
            self._cache = cache = KVCache(self.config, B, T, self._dtype, self.device)
        return self._model.hidden(tokens, cache, 0)

    def head(self, h: Tensor) -> Tensor:
        """Map the residual stream [B, T, hidden] to logits [B, T, V]."""
        return self._model.head(h)


def scored_with(model: Runner, dtype: torch.dtype) -> LanguageModel:
    """Return `model` as it is scored when its KV cache is of `dtype`: itself where that is its own dtype."""
    return model if dtype == model.dtype else ThroughCache(model, dtype)
