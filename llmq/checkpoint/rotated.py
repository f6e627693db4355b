"""A model whose parameters are rotated as they are read: a part of it at a time, or all that is in memory.

What comes after sees a model that computes the same function with other weights: statistics, Fisher factors and the original
that distillation learns from are those of the rotated model, without any of them knowing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from llmq.algorithms.rotation import Rotation, rotate_block, rotate_embedding, rotate_head
from llmq.checkpoint.load import assign
from llmq.checkpoint.parts import PartwiseModel, part_of
from llmq.checkpoint.source import EMBEDDING as EMBEDDING_WEIGHT
from llmq.checkpoint.source import HEAD as HEAD_WEIGHT
from llmq.checkpoint.source import Checkpoint
from llmq.errors import SchemeError, UsageError
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.block import EMBEDDING, HEAD

Rotate = Literal["auto", "none", "heads", "residual", "both"]
"""R2 of every head, R1 of the residual stream, or both, see `algorithms.rotation`; 'auto': what the scheme gains by, if any."""

_NORM = "model.norm.weight"


class RotatedModel(PartwiseModel):
    """An original checkpoint, a part at a time, each part rotated when it is opened, and rounded to the compute dtype again."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype | None, rotation: Rotation, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        self._rotation = rotation

    def open(self, part: str) -> None:
        """See `PartwiseModel.open`."""
        super().open(part)
        _rotate_part(self.model, part, self.parts[part], self._rotation)


def rotate_model_(model: Llama, rotation: Rotation) -> None:
    """Rotate a whole model in place; its parameters keep their dtype."""
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(part_of(name), []).append(name)
    for part, names in parts.items():
        _rotate_part(model, part, names, rotation)


def settle_rotation(rotate: str, config: LlamaConfig, resolved: ResolvedScheme) -> str:
    """Return what is rotated, with 'auto' settled: all that this model allows, where its scheme gains by it.

    Raises:
        UsageError: there is no such kind.
        SchemeError: the residual stream is to be rotated, and the head is the embedding.
    """
    if rotate == "auto":
        rotate = ("heads" if config.tie_word_embeddings else "both") if resolved.rotates else "none"
    rotation_of(rotate, config, 0)
    return rotate


def rotation_of(rotate: str, config: LlamaConfig, seed: int) -> Rotation | None:
    """Return the rotations of a settled kind; None for 'none'.

    Raises:
        UsageError: there is no such kind.
        SchemeError: the residual stream is to be rotated, and the head is the embedding.
    """
    if rotate not in get_args(Rotate):
        raise UsageError(f"what to rotate is one of {', '.join(get_args(Rotate))}, got {rotate!r}.")
    if rotate == "none":
        return None
    residual = rotate in ("residual", "both")
    if residual and config.tie_word_embeddings:
        raise SchemeError(
            "the residual stream of this model cannot be rotated: its head is its embedding, and the final norm's weight would "
            "go into one of them only; rotate 'heads', or nothing."
        )
    return Rotation(config.hidden_size, config.head_dim, seed, residual=residual, heads=rotate in ("heads", "both"))


def rotation_json(rotate: str, seed: int) -> dict[str, Any] | None:
    """Return what a manifest says of a rotation."""
    return None if rotate == "none" else {"kind": rotate, "seed": seed}


def _rotate_part(model: Llama, part: str, names: list[str], rotation: Rotation) -> None:
    parameters = {name: model.get_parameter(name).detach() for name in names}
    if part == EMBEDDING:
        tied = model.config.tie_word_embeddings
        changed: Mapping[str, torch.Tensor] = {
            EMBEDDING_WEIGHT: rotate_embedding(parameters[EMBEDDING_WEIGHT], rotation, tied=tied)
        }
    elif part == HEAD:
        if rotation.r1 is None:
            return
        changed = dict(zip((_NORM, HEAD_WEIGHT), rotate_head(parameters[_NORM], parameters[HEAD_WEIGHT], rotation), strict=True))
    else:
        inside = {name.removeprefix(f"{part}."): value for name, value in parameters.items()}
        layer = int(part.rpartition(".")[2])
        changed = {f"{part}.{name}": value for name, value in rotate_block(inside, rotation, layer).items()}
    for name, value in changed.items():
        if value is not parameters[name]:
            assign(model, name, value.to(parameters[name].dtype))
