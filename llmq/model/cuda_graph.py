"""GraphLlama: the decode step as a CUDA graph, recorded once and replayed for each token.

torch launches some 25 kernels a block, each from Python: on a fast GPU that takes longer than the kernels do. A CUDA graph holds
the launches of a whole step and costs one. Its kernels read and write the addresses that they were recorded with, hence:

    tokens [B, 1], position [1]    buffers that every call fills before the replay
    keys, values                   the cache's own memory: another cache is another recording
    logits [B, 1, vocab]           a buffer that the replay fills, and the caller gets a copy of
    visible context                a fixed number of positions under a mask, see `stepped`: a recording for each such number

What is recorded is the step of `Llama` itself, so whatever it calls is recorded too: SDPA or a fused attention, a float cache or
int8, any kernel of the weights that does not wait for the device. Prompts run without a graph: few and long, their launches hide
behind the work.

`Capture` is the seam: recording and replaying are the device's, all else here runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llmq.errors import KernelError
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.stepped import SteppedLlama
from llmq.ops.usage import Usage, current_usage, record_usage
from llmq.progress import SILENT, Progress

_WARM_UPS = 2
"""Runs before a recording: libraries make their workspaces in the first, kernels are compiled, and memory finds its place."""
_TRIAL_LENGTH = 16


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded step: `replay` runs it, on the memory it was recorded with, and fills `output`."""

    replay: Callable[[], None]
    output: Tensor


class Capture(Protocol):
    """Records what a call does on the device."""

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """Run `step` until it has nothing left to prepare, then record it; running it again must change nothing.

        Raises:
            RuntimeError: it does something that cannot be recorded.
        """
        ...


class CudaCapture:
    """CUDA graphs on one device; those of one `CudaCapture` share their memory, so that one replays at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """See `Capture.record`."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):  # what runs first must not be on the stream of a recording
                for _ in range(_WARM_UPS):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = step()
        return Recording(graph.replay, output)


@dataclass
class _Steps:
    """The recordings for one cache, by how many positions they read, and the buffers that they all read from."""

    tokens: Tensor
    position: Tensor
    recordings: dict[int, Recording] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def fill(self, tokens: Tensor, start: int | Tensor) -> None:
        """Put a call's arguments where the recordings look for them."""
        self.tokens.copy_(tokens)
        if isinstance(start, Tensor):
            self.position.copy_(start.reshape(1))
        else:
            self.position.fill_(start)


class GraphLlama(SteppedLlama):
    """Runs a `Llama` with a recorded decode step; see the module.

    Args:
        model: the model, its weights prepared.
        capture: what records; None: CUDA graphs on the model's device.
        progress: is told of every recording.
    """

    def __init__(self, model: Llama, capture: Capture | None = None, progress: Progress = SILENT) -> None:
        super().__init__(model, progress)
        self._capture = CudaCapture(model.device) if capture is None else capture
        self._steps: WeakKeyDictionary[KVCache, _Steps] = WeakKeyDictionary()

    def step(self, tokens: Tensor, cache: KVCache, start: int | Tensor) -> Tensor:
        """See `SteppedLlama.step`.

        Raises:
            KernelError: the step cannot be recorded.
        """
        steps = self._steps.get(cache)
        if steps is None:
            position = torch.zeros(1, dtype=torch.int64, device=self.device)
            steps = self._steps[cache] = _Steps(torch.zeros_like(tokens, dtype=torch.int64), position)
        steps.fill(tokens, start)
        span = self.span(cache, start)
        recording = steps.recordings.get(span)
        if recording is None:
            recording = steps.recordings[span] = self._record(steps, self.first(cache, span))
        recording.replay()
        usage = current_usage()
        if usage is not None:  # a replay does not come back to Python
            usage.include(steps.usage)
        return recording.output.clone()

    def prompt(self, tokens: Tensor, cache: KVCache | None, start: int | Tensor) -> Tensor:
        """See `SteppedLlama.prompt`."""
        return self.model.hidden(tokens, cache, start)

    def _record(self, steps: _Steps, first: KVCache) -> Recording:
        """Record the step that reads and writes `first`; it writes the same keys and values however often it runs."""

        def step() -> Tensor:
            with record_usage() as steps.usage:
                logits: Tensor = self.model(steps.tokens, first, steps.position)
            return logits

        with self.progress.task(f"recording the decode step of {first.batch_size} x {first.max_length} tokens", 1) as advance:
            try:
                recording = self._capture.record(step)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise KernelError(f"a CUDA graph cannot hold the decode step: {reason}; use --runtime torch.") from error
            advance(1)
        return recording


def obstacle(model: Llama, kv_dtype: torch.dtype | None = None) -> str | None:
    """Return why a CUDA graph cannot run the decode step of `model` with a KV cache of `kv_dtype`; None: it can."""
    if model.device.type != "cuda":
        return f"CUDA graphs are for NVIDIA GPUs, and the model is on {model.device.type}"
    return trial(GraphLlama(model), kv_dtype or model.dtype)


def trial(runner: GraphLlama, kv_dtype: torch.dtype) -> str | None:
    """Record a step of one sequence and a short cache, because only that shows whether it can be; return why not, or None."""
    length = min(_TRIAL_LENGTH, runner.config.max_position_embeddings)
    cache = KVCache(runner.config, 1, length, kv_dtype, runner.device)
    try:
        runner(torch.zeros(1, 1, dtype=torch.int64, device=runner.device), cache, 0)
    except KernelError as error:
        return str(error).partition("; use --runtime")[0]
    return None
