"""llmq itself, as its library runs: open_model, then prefill and decode_step on whatever runtime it chose."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

import llmq
from llmq.api.loading import Setup, open_model
from llmq.api.recipes import HEAD, Recipe
from llmq.benchmark.traffic import traffic_of_model
from llmq.evaluation.protocols import Window
from llmq.evaluation.scoring import Batching, slabs, token_losses
from llmq.model.generate import decode_step, prefill
from llmq.model.kv_cache import KVCache
from peers.protocol import Order, StepEngine, serve


class Llmq(StepEngine):
    """One checkpoint, quantized by one scheme after loading, the head too."""

    def __init__(self, order: Order) -> None:
        scheme = order.options["scheme"]
        recipe = Recipe(scheme, options=order.options.get("set", {}), lm_head=order.options["bits"] < 16)
        self.loaded = open_model(str(order.weights), recipe, Setup(threads=order.threads))
        self.runner = self.loaded.runner
        self.order = order
        self.cache = self.new_cache(1, order.context)
        self.position = 0

    def new_cache(self, rows: int, length: int) -> KVCache:
        """Return a cache for sequences of at most `length` tokens."""
        length = min(length, self.runner.config.max_position_embeddings)
        return KVCache(self.runner.config, rows, length, self.loaded.kv_dtype, self.runner.device)

    def info(self) -> dict[str, Any]:
        """See `Engine.info`."""
        step = traffic_of_model(self.loaded.model).decode_bytes(1, 1)
        subject = self.loaded.subject(with_tokenizer=False)
        quantized = {choice.fqn for choice in self.loaded.choices}
        return {
            "version": llmq.__version__,
            "head": self.loaded.scheme if f"{HEAD}.weight" in quantized else self.loaded.setup.dtype,
            "bytes": subject.size_bytes,
            "step_bytes": step.linears + step.vectors,
            "settings": {
                "runtime": self.loaded.runtime.describe(),
                "kernels": "; ".join(sorted({choice.kernels for choice in self.loaded.choices})),
                "kv_cache": str(self.cache.dtype).removeprefix("torch."),
            },
            "subject": subject.model_dump(mode="json"),
        }

    def start(self, tokens: list[int], room: int) -> np.ndarray:
        """See `StepEngine.start`."""
        del room  # the cache is made for the longest
        self.position = len(tokens)
        return self.numbers(prefill(self.runner, self.cache, torch.tensor([tokens])))

    def step(self, token: int) -> np.ndarray:
        """See `StepEngine.step`."""
        logits = decode_step(self.runner, self.cache, torch.tensor([[token]]), self.position)
        self.position += 1
        return self.numbers(logits)

    def numbers(self, logits: torch.Tensor) -> np.ndarray:
        """Return logits [1, 1, vocab] as fp32 [vocab]."""
        found: np.ndarray = logits[0, -1].float().numpy()
        return found

    def batch(self, tokens: list[int], new_tokens: int, rows: int) -> list[float]:
        """See `Engine.batch`."""
        cache = self.new_cache(rows, len(tokens) + new_tokens)
        chosen = prefill(self.runner, cache, torch.tensor([tokens] * rows))[:, -1].argmax(-1, keepdim=True)
        seconds = []
        for position in range(len(tokens), len(tokens) + new_tokens):
            begin = time.perf_counter()
            chosen = decode_step(self.runner, cache, chosen, position)[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def score(self, tokens: list[int]) -> float:
        """See `Engine.score`: what `llmq eval perplexity` does with one window."""
        window = Window(torch.tensor(tokens[:-1]), torch.tensor(tokens[1:]), 0)
        with torch.no_grad():
            losses = [token_losses(slab) for slab in slabs(self.runner, [window], Batching())]
        return float(torch.cat(losses).double().mean())


if __name__ == "__main__":
    serve(Llmq)
