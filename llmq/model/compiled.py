"""CompiledLlama: the forward pass as torch.compile makes it, one graph for decode steps and one for everything else.

A compiled graph is specialised for shapes, so shapes are kept from changing: a step reads a fixed number of positions (see
`stepped`) and takes its position as a tensor, and the lengths of prompts and caches are symbols that one graph serves.

On a CPU the gain is fused loops. On a GPU decode steps are compiled with `mode="reduce-overhead"`, which also records them as
CUDA graphs; the cache's memory is marked as staying where it is, for else it would be copied at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from weakref import WeakSet

import torch
from torch import Tensor, nn

from llmq.errors import KernelError
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.stepped import SteppedLlama
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import current_usage, record_usage
from llmq.progress import SILENT, Progress

_SETTLING_RUNS = 3
"""First runs of a step on a GPU: it is compiled, warmed up, and recorded."""


class CompiledLlama(SteppedLlama):
    """Runs a `Llama` under torch.compile; see the module.

    Args:
        model: the model, its weights prepared.
        progress: is told of everything that is compiled.
        backend: of torch.compile; "eager" traces and compiles nothing.
    """

    def __init__(self, model: Llama, progress: Progress = SILENT, backend: str = "inductor") -> None:
        super().__init__(model, progress)
        self._on_gpu = model.device.type == "cuda"
        self._step: Callable[..., Tensor] = torch.compile(
            _own(_decode), fullgraph=True, backend=backend, mode="reduce-overhead" if self._on_gpu else None
        )
        self._prompt: Callable[..., Tensor] = torch.compile(_own(_hidden), fullgraph=True, backend=backend)
        self._position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._seen: set[tuple[object, ...]] = set()
        self._settled: WeakSet[KVCache] = WeakSet()

    def step(self, tokens: Tensor, cache: KVCache, start: int | Tensor) -> Tensor:
        """See `SteppedLlama.step`.

        Raises:
            KernelError: torch.compile fails.
        """
        if isinstance(start, Tensor):
            self._position.copy_(start.reshape(1))
        else:
            self._position.fill_(start)
        tokens = tokens.contiguous()  # one kind of strides
        first = self.first(cache, self.span(cache, start))
        with self._counted(tokens.numel(), head=True):
            if first not in self._settled:
                self._settle_step(tokens, first)
            logits = self._run_step(tokens, first)
        return logits.clone() if self._on_gpu else logits  # a recording's own would be overwritten by the next

    def prompt(self, tokens: Tensor, cache: KVCache | None, start: int | Tensor) -> Tensor:
        """See `SteppedLlama.prompt`."""
        tokens = tokens.clone(memory_format=torch.contiguous_format)  # the mark stays on it
        torch._dynamo.maybe_mark_dynamic(tokens, 1)  # noqa: SLF001 - documented, and nowhere else
        if cache is not None:
            cache = self.first(cache, cache.max_length)
            _free_length(cache)
        whole = cache

        def run() -> Tensor:
            return self._prompt(self.model, tokens, whole, start)

        with self._counted(tokens.numel(), head=False):
            first_piece = isinstance(start, int) and start == 0
            if self._begins("prompt", tokens.shape[0], None if whole is None else whole.dtype, first_piece):
                self._settle("prompt", run, 1)
            return run()

    def _settle_step(self, tokens: Tensor, first: KVCache) -> None:
        """Run the step on memory that it has not met until nothing is left to prepare."""
        _free_length(first)
        if self._on_gpu:
            for tensor in (*first.tensors, first.cosines, first.sines, self._position):
                torch._dynamo.mark_static_address(tensor)  # noqa: SLF001 - documented, and nowhere else
        if self._on_gpu or self._begins("step", first.batch_size, first.dtype):
            self._settle("decode step", lambda: self._run_step(tokens, first), _SETTLING_RUNS if self._on_gpu else 1)
        self._settled.add(first)

    def _run_step(self, tokens: Tensor, first: KVCache) -> Tensor:
        if self._on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._step(self.model, tokens, first, self._position)

    def _begins(self, *kind: object) -> bool:
        """Whether this is the first call of its kind, and so may compile."""
        if kind in self._seen:
            return False
        self._seen.add(kind)
        return True

    def _settle(self, what: str, run: Callable[[], object], times: int) -> None:
        """Compile: run what is idempotent, and say what went wrong in a sentence."""
        with self.progress.task(f"compiling the {what}", 1) as advance:
            try:
                for _ in range(times):
                    run()
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise KernelError(f"torch.compile cannot compile the {what}: {reason}; use another --runtime.") from error
            advance(1)

    @contextmanager
    def _counted(self, rows: int, *, head: bool) -> Iterator[None]:
        """Tell `record_usage` what a graph runs: it does not come back to Python, and runs what `prepare` chose."""
        usage = current_usage()
        with record_usage():  # of what does come back; compiling does
            yield
        if usage is None:
            return
        for linear in (self.model if head else self.model.model).modules():
            if isinstance(linear, nn.Linear) and isinstance(linear.weight, QuantizedTensor):
                usage.add(linear.weight.pick(rows).name, id(linear.weight.stored[0]))


def _decode(model: Llama, tokens: Tensor, cache: KVCache, position: Tensor) -> Tensor:
    return model(tokens, cache, position)  # type: ignore[no-any-return]


def _hidden(model: Llama, tokens: Tensor, cache: KVCache | None, start: int | Tensor) -> Tensor:
    return model.hidden(tokens, cache, start)


def _own(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a copy with code of its own: torch keeps few graphs of one code, and other models' would count."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _free_length(cache: KVCache) -> None:
    """Let a graph serve caches of any length."""
    for tensor in cache.tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 2)  # noqa: SLF001 - documented, and nowhere else
    for table in (cache.cosines, cache.sines):
        torch._dynamo.maybe_mark_dynamic(table, 0)  # noqa: SLF001 - as above
