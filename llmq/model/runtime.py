"""Who runs a model's forward pass: the native runtime, one call for all of it, or torch, one operator after the other.

Both are a `Runner`, so that generation, evaluation and benchmarks do not care. `choose_runtime` says which one a model gets, and
why not the other: what ran is part of every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmq.errors import KernelError, UsageError, suggest
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.native import NativeLlama, obstacle

AUTO, NATIVE, TORCH = "auto", "native", "torch"
RUNTIMES = (AUTO, NATIVE, TORCH)
"""What can be asked for: `auto` is native wherever it can be."""


class Runner(Protocol):
    """What inference needs of a model; `Llama` and `NativeLlama` are two."""

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream and of the logits."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens and cache have to be."""
        ...

    def __call__(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """See `Llama.forward`."""
        ...

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """See `Llama.hidden`."""
        ...

    def head(self, h: Tensor) -> Tensor:
        """See `Llama.head`."""
        ...

    def last_logits(self, tokens: Tensor, cache: KVCache | None = None, start: int | Tensor = 0) -> Tensor:
        """See `Llama.last_logits`."""
        ...


@dataclass(frozen=True, eq=False)
class Runtime:
    """What was chosen for one model."""

    runner: Llama | NativeLlama
    name: str
    """'native (avx2)' or 'torch'."""
    reason: str
    """Why it is torch; empty when it is not."""
    fell_back: bool = False
    """The native runtime was wanted, as far as possible, and was not."""

    def describe(self) -> str:
        """Return 'native (avx2)', or 'torch: reason'."""
        return f"{self.name}: {self.reason}" if self.reason else self.name

    @property
    def note(self) -> str:
        """What a result record says of it."""
        return f"runtime: {self.describe()}"


def choose_runtime(model: Llama, wanted: str = AUTO, *, kv_dtype: torch.dtype | None = None) -> Runtime:
    """Return what runs `model`, whose weights are prepared (`ops.select.prepare`) and stay as they are from now on.

    Args:
        model: the model.
        wanted: one of `RUNTIMES`.
        kv_dtype: of the KV cache that it will run with; None: the model's.

    Raises:
        UsageError: `wanted` is unknown.
        KernelError: `native` was asked for, and cannot be; says why.
    """
    check_runtime(wanted)
    if wanted == TORCH:
        return Runtime(model, TORCH, "it was asked for")
    reason = obstacle(model, kv_dtype)
    if reason is None:
        native = NativeLlama(model)
        return Runtime(native, f"{NATIVE} ({native.isa})", "")
    if wanted == NATIVE:
        raise KernelError(f"the native runtime cannot run this model: {reason}; use --runtime auto or torch.")
    return Runtime(model, TORCH, reason, fell_back=True)


def check_runtime(name: str) -> None:
    """Raise UsageError when no runtime is called `name`."""
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}.{suggest(name, list(RUNTIMES))}")


def weights_of(runner: Llama | NativeLlama) -> Llama:
    """Return the model whose weights `runner` runs."""
    return runner if isinstance(runner, Llama) else runner.model
