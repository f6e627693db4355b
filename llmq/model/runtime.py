"""Who runs a model's forward pass.

    native     one call of the native library for all of it (CPU)
    graph      torch, the decode step recorded once as a CUDA graph (GPU)
    compile    what torch.compile makes of it
    torch      one operator after the other: the reference of the others

Each is a `Runner`, so that generation, evaluation and benchmarks do not care. `choose_runtime` says which one a model gets, and
why not another: what ran is part of every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmq.errors import KernelError, UsageError, suggest
from llmq.model import cuda_graph, native
from llmq.model.compiled import CompiledLlama
from llmq.model.config import LlamaConfig
from llmq.model.cuda_graph import GraphLlama
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.native import NativeLlama
from llmq.progress import SILENT, Progress

AUTO, NATIVE, GRAPH, COMPILE, TORCH = "auto", "native", "graph", "compile", "torch"
RUNTIMES = (AUTO, NATIVE, GRAPH, COMPILE, TORCH)
"""What can be asked for: `auto` is graph on a GPU and native on a CPU, wherever they can be."""

ModelRunner = Llama | NativeLlama | GraphLlama | CompiledLlama
"""Everything that `choose_runtime` returns."""


class Runner(Protocol):
    """What inference needs of a model; `ModelRunner` names those that there are."""

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

    runner: ModelRunner
    name: str
    """'native (avx2)', 'graph', 'compile' or 'torch'."""
    reason: str
    """Why it is torch; empty when it is not."""
    fell_back: bool = False
    """Another runtime was wanted, as far as possible, and was not."""

    def describe(self) -> str:
        """Return 'native (avx2)', or 'torch: reason'."""
        return f"{self.name}: {self.reason}" if self.reason else self.name

    @property
    def note(self) -> str:
        """What a result record says of it."""
        return f"runtime: {self.describe()}"


def choose_runtime(
    model: Llama, wanted: str = AUTO, *, kv_dtype: torch.dtype | None = None, progress: Progress = SILENT
) -> Runtime:
    """Return what runs `model`, whose weights are prepared (`ops.select.prepare`) and stay as they are from now on.

    Args:
        model: the model.
        wanted: one of `RUNTIMES`.
        kv_dtype: of the KV cache that it will run with; None: the model's.
        progress: is told by runtimes that prepare something at the first call of a kind.

    Raises:
        UsageError: `wanted` is unknown.
        KernelError: a runtime was asked for that cannot be; says why.
    """
    check_runtime(wanted)
    if wanted == TORCH:
        return Runtime(model, TORCH, "it was asked for")
    if wanted == COMPILE:
        return Runtime(CompiledLlama(model, progress), COMPILE, "")
    graphs = wanted == GRAPH or (wanted == AUTO and model.device.type == "cuda")
    reason = cuda_graph.obstacle(model, kv_dtype) if graphs else native.obstacle(model, kv_dtype)
    if reason is None and graphs:
        return Runtime(GraphLlama(model, progress=progress), GRAPH, "")
    if reason is None:
        runner = NativeLlama(model)
        return Runtime(runner, f"{NATIVE} ({runner.isa})", "")
    if wanted != AUTO:
        raise KernelError(f"the {wanted} runtime cannot run this model: {reason}; use --runtime auto or torch.")
    return Runtime(model, TORCH, reason, fell_back=True)


def check_runtime(name: str) -> None:
    """Raise UsageError when no runtime is called `name`."""
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}.{suggest(name, list(RUNTIMES))}")


def weights_of(runner: ModelRunner) -> Llama:
    """Return the model whose weights `runner` runs."""
    return runner if isinstance(runner, Llama) else runner.model
