"""Generation: a prefill, then one decode step a token, each token sampled from the last logits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.model.kv_cache import KVCache
from llmq.model.runtime import Runner


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the `top_k` most likely tokens may be chosen; None: all.
        top_p: only the most likely tokens that together reach this probability (nucleus sampling, arXiv:1904.09751);
            None: all. Applied after temperature and `top_k`.
        seed: of the random generator; the same seed gives the same tokens on the same machine.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, got {self.top_k}; leave it out to allow every token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}; leave it out to allow every token.")


GREEDY = Sampling()


@torch.no_grad()
def prefill(model: Runner, cache: KVCache, tokens: Tensor) -> Tensor:
    """Write the keys and values of `tokens` int64 [B, T] into the cache, from position 0.

    Returns:
        the logits [B, 1, vocab] of the last token.
    """
    return model.last_logits(tokens, cache, 0)


@torch.no_grad()
def decode_step(model: Runner, cache: KVCache, tokens: Tensor, position: int | Tensor) -> Tensor:
    """Advance every sequence of the batch by one token.

    Args:
        model: the model.
        cache: holds all positions before `position`, and afterwards `position` too.
        tokens: int64 [B, 1], the tokens at `position`.
        position: an int; or a tensor of one integer, under a torch.compile of one's own. See `Llama.forward`.

    Returns:
        the logits [B, 1, vocab] of the next token.
    """
    return model(tokens, cache, position)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose one token a row of `logits` [B, vocab]; returns int64 [B, 1]. Probabilities are computed in fp32."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the token that crosses top_p still belongs to the nucleus
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        scores = scores.masked_fill(outside, -torch.inf)
    return scores.softmax(-1).multinomial(1, generator=generator)


def generate(
    model: Runner,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    Args:
        model: the model; batch 1.
        prompt_tokens: the prompt, BOS included where the model wants one.
        max_new_tokens: how many tokens at most.
        sampling: how each is chosen.
        stop: tokens that end the text, and are not yielded; None: the configuration's `eos_token_ids`.
        kv_dtype: of the KV cache, see `KVCache`; None: the model's.

    Returns:
        an iterator over the new tokens. Everything is checked before it is returned, not when it is first asked.

    Raises:
        UsageError: the prompt is empty or has a token that is not in the vocabulary, or prompt and new tokens together are
            beyond the model's context.
    """
    config = model.config
    limit = config.max_position_embeddings
    if not prompt_tokens:
        raise UsageError("the prompt has no tokens; give at least one (BOS will do).")
    strangers = [token for token in prompt_tokens if not 0 <= token < config.vocab_size]
    if strangers:
        raise UsageError(f"prompt token {strangers[0]} is not in the model's vocabulary of {config.vocab_size} tokens.")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    length = len(prompt_tokens) + max_new_tokens
    if length > limit:
        room = max(0, limit - len(prompt_tokens))
        raise UsageError(
            f"a prompt of {len(prompt_tokens)} tokens and {max_new_tokens} new ones are beyond the model's context of {limit} "
            f"tokens; shorten the prompt, or ask for at most {room} new tokens."
        )
    ends = frozenset(config.eos_token_ids if stop is None else stop)
    cache = KVCache(config, 1, length, kv_dtype or model.dtype, model.device)
    return _generate(model, cache, list(prompt_tokens), sampling, ends)


def _generate(model: Runner, cache: KVCache, prompt: list[int], sampling: Sampling, ends: frozenset[int]) -> Iterator[int]:
    """Yield new tokens until the cache is full: the last one is chosen, and not written into it."""
    device = model.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    logits = prefill(model, cache, torch.tensor([prompt], device=device))
    for position in range(len(prompt), cache.max_length):
        tokens = sample(logits[:, -1], sampling, generator)
        token = int(tokens)
        if token in ends:
            return
        yield token
        if position + 1 < cache.max_length:
            logits = decode_step(model, cache, tokens, position)
