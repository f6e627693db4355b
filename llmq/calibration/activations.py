"""Hidden states of all calibration windows between two blocks: where the model runs, in host memory, or on disk.

A file is gone when nobody uses it. What is not where the model runs goes there and back a batch at a time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from llmq.errors import OutputError, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_TOKENS = 2048
"""Tokens that go through a block at once: enough for full speed, few enough for little memory."""

HOST: Final = "host"
Spill = Path | Literal["host"] | None
"""Where hidden states lie: on the disk of a folder, in the host's memory (`HOST`), or, with None, where the model runs."""


class Activations:
    """[n, T, hidden] that is read and replaced a batch at a time.

    Attributes:
        states: the tensor, bf16 or fp32.
        batches: views of it, [B, T, hidden] each; writing into one replaces those windows. `brought` reads one.
        device: where the model runs.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, *, spill: Spill = None, device: torch.device | None = None
    ) -> None:
        """Make room.

        Args:
            shape: windows, tokens a window, hidden size.
            dtype: to store.
            spill: where.
            device: where the model runs; None: on the CPU.

        Raises:
            OutputError: the disk has no room for them.
        """
        self.device = device or torch.device("cpu")
        if isinstance(spill, Path):
            self.states = _on_disk(shape, dtype, spill)
        elif spill == HOST:  # pinned: a GPU then reads it at full speed, and beside its other work
            self.states = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        else:
            self.states = torch.empty(shape, dtype=dtype, device=self.device)
        self.batches: tuple[Tensor, ...] = torch.split(self.states, max(1, BATCH_TOKENS // shape[1]))

    def like(self, *, spill: Spill = None) -> Activations:
        """Return another of the same shape and dtype with the same content."""
        other = Activations(_shape(self.states), self.states.dtype, spill=spill, device=self.device)
        for mine, its in zip(self.batches, other.batches, strict=True):
            its.copy_(mine)
        return other

    def windows(self, which: Tensor) -> Tensor:
        """Return the states [B, T, hidden] of some windows, int64 [B] on the CPU, where the model runs."""
        return self.states[which.to(self.states.device)].to(self.device)


def brought(batch: Tensor, device: torch.device) -> Tensor:
    """Return hidden states in fp32 on `device`: moved as they are kept, and widened there."""
    return batch.to(device, non_blocking=True).float()


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
