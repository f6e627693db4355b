"""Hidden states of all calibration windows between two blocks: in memory, or in a file that is gone when nobody uses it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmq.errors import OutputError, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_TOKENS = 2048
"""Tokens that go through a block at once: enough for full speed, few enough for little memory."""


class Activations:
    """[n, T, hidden] that is read and replaced a batch at a time.

    Attributes:
        states: the tensor, bf16 or fp32.
        batches: views of it, [B, T, hidden] each; writing into one replaces those windows.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, spill: Path | None = None) -> None:
        """Make room.

        Args:
            shape: windows, tokens a window, hidden size.
            dtype: to store.
            spill: folder on whose disk the states lie; None: in memory.

        Raises:
            OutputError: the disk has no room for them.
        """
        self.states = torch.empty(shape, dtype=dtype) if spill is None else _on_disk(shape, dtype, spill)
        self.batches: tuple[Tensor, ...] = torch.split(self.states, max(1, BATCH_TOKENS // shape[1]))

    def like(self, *, spill: Path | None = None) -> Activations:
        """Return another of the same shape and dtype with the same content."""
        other = Activations(_shape(self.states), self.states.dtype, spill=spill)
        for mine, its in zip(self.batches, other.batches, strict=True):
            its.copy_(mine)
        return other


def activation_dtype(name: str) -> torch.dtype:
    """Return the dtype of an option's value; raises UsageError for an unknown one."""
    if name not in DTYPES:
        raise UsageError(f"activations are kept in {' or '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]


def _shape(tensor: Tensor) -> tuple[int, int, int]:
    n, t, hidden = tensor.shape
    return n, t, hidden


def _on_disk(shape: tuple[int, int, int], dtype: torch.dtype, folder: Path) -> Tensor:
    count = shape[0] * shape[1] * shape[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
            # every byte is written now: a full disk would otherwise end the program in the middle of a batch
            chunk = bytes(1 << 24)
            left = count * dtype.itemsize
            while left > 0:
                left -= file.write(chunk[:left])
            file.flush()
            # the mapping keeps the content when the name is gone
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        raise OutputError(
            f"cannot spill {count * dtype.itemsize:,} bytes of activations to {folder}: {error.strerror or error}; "
            "name a folder on a disk with more room."
        ) from error
