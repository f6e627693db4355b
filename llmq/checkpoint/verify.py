"""Are the bytes those that were written, and the weights numbers?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.source import Checkpoint
from llmq.errors import CheckpointError
from llmq.files import sha256_file
from llmq.numerics.float8 import DTYPE as FLOAT8
from llmq.numerics.float8 import has_nan
from llmq.progress import SILENT, Progress


def verify(checkpoint: Checkpoint, *, progress: Progress = SILENT) -> None:
    """Read every weight of an opened checkpoint: none is NaN or infinite, and an artefact's files have their hashes.

    Names, shapes and dtypes were compared with the configuration when the checkpoint was opened.

    Raises:
        CheckpointError: a weight is not finite, or a file's bytes are not those that were written.
    """
    if checkpoint.manifest is not None:
        with progress.task("hashing", total=len(checkpoint.files)) as advance:
            for path in checkpoint.files:
                _check_hash(path, checkpoint.manifest.weights[path.name].sha256)
                advance(1)
    with progress.task("reading weights", total=len(checkpoint.tensors)) as advance:
        for name, info in checkpoint.tensors.items():
            if info.dtype.is_floating_point:
                refuse_not_finite(name, info.file, checkpoint.read(name))
                checkpoint.release()
            advance(1)


def refuse_not_finite(name: str, file: Path, stored: Tensor, *, cast: Tensor | None = None) -> None:
    """Raise CheckpointError when a weight is NaN or infinite.

    Args:
        name: the tensor's.
        file: that holds it.
        stored: as it was read.
        cast: as it is used; only it is looked at unless something is wrong. None: as it was read.
    """
    used = stored if cast is None else cast
    if is_finite(used):
        return
    if is_finite(stored):
        largest = float(stored.double().abs().max())
        raise CheckpointError(
            f"tensor {name} in {file} has values beyond the range of {str(used.dtype).removeprefix('torch.')} (the largest is "
            f"{largest:.4g}); load the checkpoint as bf16 or fp32."
        )
    stored = stored.float() if stored.dtype == FLOAT8 else stored  # torch has few functions of float8
    bad = torch.nonzero(~torch.isfinite(stored))
    first = tuple(bad[0].tolist())
    raise CheckpointError(
        f"tensor {name} in {file} has NaN or infinite values ({len(bad)} of {stored.numel()}, the first is "
        f"{stored[first].item()} at {list(first)}); the checkpoint is damaged, get it again."
    )


def is_finite(tensor: Tensor) -> bool:
    """One pass and no temporary: NaN anywhere makes both extremes NaN, and an infinity is an extreme."""
    if not tensor.numel():
        return True
    if tensor.dtype == FLOAT8:
        return not has_nan(tensor)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_hash(path: Path, expected: str) -> None:
    got = sha256_file(path)
    if got != expected:
        raise CheckpointError(f"{path} was changed or damaged: its SHA-256 is {got[:16]}…, its manifest says {expected[:16]}….")
