"""The one loop that runs a model over windows and scores tokens; perplexity, divergence and lm-eval requests all come here.

Memory is bounded twice over. Windows are batched up to a number of tokens, and the output head is applied only to positions
that are scored, a slab of rows at a time: a vocabulary of 128k would otherwise need a gigabyte of fp32 for one window of 2048.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.errors import CheckpointError, TokenizerError
from llmq.evaluation.protocols import Window

_CPU_CHUNK = 1 << 18
"""Elements that the softmax takes at a time on a CPU: 1 MiB of fp32 stays in a second- or third-level cache."""
_GPU_CHUNK = 1 << 25


class HasContext(Protocol):
    """A model's configuration, as far as evaluation needs it."""

    @property
    def max_position_embeddings(self) -> int:
        """Most tokens the model reads at once."""
        ...

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        ...


class LanguageModel(Protocol):
    """What evaluation needs of a model; `llmq.model.llama.Llama` is one."""

    @property
    def config(self) -> HasContext:
        """Context and vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens have to be."""
        ...

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [B, T] to the residual stream [B, T, hidden]."""
        ...

    def head(self, h: Tensor) -> Tensor:
        """Map the residual stream [B, T, hidden] to logits [B, T, V]."""
        ...


@dataclass(frozen=True, slots=True)
class Batching:
    """How much is computed at once. It changes results by rounding only, but bit-identity holds only under equal batching."""

    tokens: int = 4096
    """Most tokens of one forward pass; at least one window is always taken."""
    logits_bytes: int = 64 << 20
    """Most bytes of fp32 logits held at once."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Some scored positions of a batch, in order."""

    logits: Tensor
    """[R, V], in the dtype that the model computes them in."""
    targets: Tensor
    """int64 [R], on the logits' device."""


def batches(windows: Sequence[Window], batching: Batching) -> Iterator[list[Window]]:
    """Group consecutive windows of the same length, so that nothing is ever padded."""
    batch: list[Window] = []
    for window in windows:
        length = window.inputs.numel()
        if batch and (batch[0].inputs.numel() != length or (len(batch) + 1) * length > batching.tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def hidden_rows(model: LanguageModel, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Run one forward pass over windows of one length up to the head; returns the scored positions.

    Returns:
        (h [R, hidden], targets int64 [R]), window after window.
    """
    tokens = torch.stack([window.inputs for window in batch]).to(model.device)  # [B, T]
    h = model.hidden(tokens)
    scored = [h[row, -window.targets.numel() :] for row, window in enumerate(batch)]
    return torch.cat(scored), torch.cat([window.targets for window in batch]).to(model.device)


def slab_rows(vocabulary: int, batching: Batching) -> int:
    """Return how many rows of logits fit into the batching's memory."""
    return max(1, batching.logits_bytes // (4 * vocabulary))


def head_slabs(model: LanguageModel, h: Tensor, targets: Tensor, batching: Batching) -> Iterator[Slab]:
    """Apply the output head to `h` [R, hidden], whose rows are scored against `targets` int64 [R], piece by piece."""
    rows = slab_rows(model.config.vocab_size, batching)
    for start in range(0, targets.numel(), rows):
        logits = model.head(h[None, start : start + rows])[0]
        yield Slab(logits, targets[start : start + rows])


def slabs(model: LanguageModel, batch: Sequence[Window], batching: Batching) -> Iterator[Slab]:
    """Run one forward pass over windows of one length and yield the logits of their scored positions."""
    h, targets = hidden_rows(model, batch)
    return head_slabs(model, h, targets, batching)


def row_chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` rows of logits into pieces that the memory close to the processor can hold."""
    step = max(1, (_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def token_losses(slab: Slab) -> Tensor:
    """Return -ln p(target) of every row in nats, float32 [R] on the CPU; the log-softmax is in fp32 whatever the logits' dtype.

    Raises:
        CheckpointError: a loss is not finite.
    """
    rows, vocabulary = slab.logits.shape
    parts = [
        F.cross_entropy(slab.logits[chunk].float(), slab.targets[chunk], reduction="none")
        for chunk in row_chunks(rows, vocabulary, slab.logits.device)
    ]
    losses = torch.cat(parts).cpu()
    if not bool(torch.isfinite(losses).all()):
        raise CheckpointError(
            f"the model gives {int((~torch.isfinite(losses)).sum())} of {rows} tokens a loss that is not finite; "
            "its weights or activations overflow: try another compute dtype or scheme."
        )
    return losses


def check_vocabulary(windows: Sequence[Window], model: LanguageModel) -> None:
    """Raise TokenizerError when a token of `windows` is not in the model's vocabulary."""
    largest = max(int(max(window.inputs.max(), window.targets.max())) for window in windows)
    if largest >= model.config.vocab_size:
        raise TokenizerError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {model.config.vocab_size} entries; "
            "use the tokenizer that belongs to the checkpoint."
        )
