"""A model of which only some parts are in memory: its embedding, one block, its head.

Parameters of the other parts are on the meta device. What is opened is mapped, checked and cast as `load_model` does, and moved
to the device that computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmq.checkpoint.complete import empty_model, parameter_shapes
from llmq.checkpoint.load import ParameterReader, assign, check_tied, default_dtype
from llmq.checkpoint.source import EMBEDDING as EMBEDDING_WEIGHT
from llmq.checkpoint.source import HEAD as HEAD_WEIGHT
from llmq.checkpoint.source import Checkpoint
from llmq.numerics.weight import float_grid
from llmq.schemes.block import EMBEDDING, HEAD

_BLOCKS = "model.layers."


class PartwiseModel:
    """An original checkpoint, a part at a time.

    Attributes:
        checkpoint: not one of llmq's artefacts.
        model: the Llama; parameters of parts that are not open are on the meta device, in the compute dtype.
        device: where parts are when they are open.
        parts: names of the parameters of each part, in the model's order.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        dtype = dtype or default_dtype(checkpoint)
        float_grid(dtype)  # refuses other dtypes
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.model = empty_model(checkpoint.config).to(dtype).eval()
        if checkpoint.config.tie_word_embeddings:
            self.model.tie_weights()
        self.parts: dict[str, list[str]] = {}
        for name in parameter_shapes(checkpoint.config):
            self.parts.setdefault(part_of(name), []).append(name)
        check_tied(checkpoint)
        self._reader = ParameterReader(checkpoint, dtype, self.device, check_finite=True)
        self._empty: Mapping[str, nn.Parameter] = dict(self.model.named_parameters(remove_duplicate=False))

    def open(self, part: str) -> None:
        """Bring the original parameters of a part.

        Raises:
            CheckpointError: a weight is not finite, or becomes infinite in the compute dtype.
        """
        for name in self.parts[part]:
            assign(self.model, name, self._reader.plain(name))
        if part == HEAD and self.checkpoint.config.tie_word_embeddings:
            assign(self.model, HEAD_WEIGHT, self._reader.plain(EMBEDDING_WEIGHT))

    def put(self, name: str, value: Tensor) -> None:
        """Give a parameter another value, which may be a `QuantizedTensor`; it goes where the open parts are."""
        assign(self.model, name, value.to(self.device))

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter, whatever its value is now."""
        return self._empty[name].shape

    def drop(self, part: str) -> None:
        """Let go of the parameters of a part, and of the mapping they were read through."""
        names = [*self.parts[part], *([HEAD_WEIGHT] if part == HEAD else [])]
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, self._empty[name])
        self.checkpoint.release()


def part_of(parameter: str) -> str:
    """Return the part that a parameter of a Llama belongs to: a block's name, `EMBEDDING` or `HEAD`."""
    if parameter.startswith(_BLOCKS):
        return _BLOCKS + parameter.removeprefix(_BLOCKS).partition(".")[0]
    return EMBEDDING if parameter == EMBEDDING_WEIGHT else HEAD
