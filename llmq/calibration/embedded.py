"""Where a walk through a model begins: its windows, embedded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibration.activations import Activations, Spill
from llmq.calibration.stages import BlockModel
from llmq.errors import TextError


def embedded(model: BlockModel, tokens: Tensor) -> Tensor:
    """Return h [B, T, hidden] of integer tokens [B, T], which may be anywhere, on the device of the parameters that are open."""
    assert isinstance(model, nn.Module)
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return model.embed(tokens.long().to(device))


def embed_windows(model: BlockModel, tokens: Tensor, dtype: torch.dtype, *, spill: Spill = None) -> tuple[Activations, Any]:
    """Return the hidden states before the first block, and what blocks need besides them in fp32.

    Args:
        model: whose embedding is open.
        tokens: windows, integers [n, T].
        dtype: of the states.
        spill: where they lie.
    """
    first = embedded(model, tokens[:1])
    shape = (len(tokens), tokens.shape[1], first.shape[2])
    states = Activations(shape, dtype, spill=spill, device=first.device)
    start = 0
    for batch in states.batches:
        batch.copy_(embedded(model, tokens[start : start + len(batch)]))
        start += len(batch)
    return states, model.context(first.float())


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Refuse windows with tokens that the model's embedding does not have; raises TextError."""
    vocabulary = next((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), None)
    largest = int(tokens.max())
    if vocabulary is not None and largest >= vocabulary:
        raise TextError(
            f"the calibration set has token {largest}, and the model only {vocabulary} tokens; record it with this checkpoint's "
            "tokenizer."
        )
