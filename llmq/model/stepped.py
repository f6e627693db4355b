"""What runtimes have in common whose decode step has static shapes, so that it is prepared once and run many times.

A step takes one token of each sequence, and its position in a tensor on the device. It cannot depend on how much of the cache is
filled, so it reads a fixed number of positions under a mask: the least power of two that holds what it must see, and the whole
cache where that is less. There is one step for each such number; a token at position 200 of a cache of 4,096 reads 256 of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.progress import SILENT, Progress

LEAST_SPAN = 128
"""Fewest positions that a step reads: below, the weights are all that takes time."""


def span_of(visible: int, max_length: int) -> int:
    """Return how many positions a step reads that must see the first `visible` of a cache of `max_length`."""
    return min(max_length, max(LEAST_SPAN, 1 << (visible - 1).bit_length()))


class SteppedLlama(ABC):
    """A `Runner` of a `Llama` that hands decode steps to `step`, and prompts to `prompt`; see the module.

    It runs the weights as they are when it is made: prepare the model first, and make a new one after any change. Calls record
    no gradients, and come from one thread.

    Args:
        model: the model.
        progress: is told of what is prepared at the first call of a kind.
    """

    def __init__(self, model: Llama, progress: Progress = SILENT) -> None:
        self.model = model
        self.config: LlamaConfig = model.config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.progress = progress
        self._spans: WeakKeyDictionary[KVCache, dict[int, KVCache]] = WeakKeyDictionary()

    @abstractmethod
    def step(self, tokens: Tensor, cache: KVCache, start: int | Tensor) -> Tensor:
        """Return the logits [B, 1, vocab] that follow `tokens` int64 [B, 1] at `start`; the caller's to keep."""

    @abstractmethod
    def prompt(self, tokens: Tensor, cache: KVCache | None, start: int | Tensor) -> Tensor:
        """Return the residual stream [B, T, hidden] of any other call; see `Llama.hidden`."""

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the logits of every token; see `Llama.forward`."""
        if cache is not None and tokens.shape[1] == 1:
            return self._checked_step(tokens, cache, start)
        return self.head(self.prompt(tokens, cache, start))

    forward = __call__

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the residual stream that `head` takes; see `Llama.hidden`."""
        return self.prompt(tokens, cache, start)

    @torch.no_grad()
    def last_logits(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """Return the logits [B, 1, vocab] of each sequence's last token; see `Llama.last_logits`."""
        if cache is not None and tokens.shape[1] == 1:
            return self._checked_step(tokens, cache, start)
        return self.head(self.prompt(tokens, cache, start)[:, -1:])

    @torch.no_grad()
    def head(self, h: Tensor) -> Tensor:
        """Return logits [B, T, vocab] for the residual stream [B, T, hidden]; see `Llama.head`."""
        return self.model.head(h)

    def span(self, cache: KVCache, start: int | Tensor) -> int:
        """Return how many positions of `cache` a step at `start` is made for: all where only the device knows `start`."""
        return cache.max_length if isinstance(start, Tensor) else span_of(start + 1, cache.max_length)

    def reads(self, cache: KVCache, start: int) -> int:
        """Return how many positions of `cache` a step at `start` really reads: the fused attention stops at what it sees."""
        return start + 1 if cache.dtype in self.model.fused_caches else self.span(cache, start)

    def first(self, cache: KVCache, span: int) -> KVCache:
        """Return the first `span` positions of `cache`; the same object each time, as long as `cache` lives."""
        spans = self._spans.setdefault(cache, {})
        if span not in spans:
            spans[span] = cache.first(span)
        return spans[span]

    def _checked_step(self, tokens: Tensor, cache: KVCache, start: int | Tensor) -> Tensor:
        cache.check(tokens.shape[0], 0 if isinstance(start, Tensor) else start, 1)
        return self.step(tokens, cache, start)
