"""What a checkpoint is."""

from __future__ import annotations

from llmq.checkpoint import Description, describe, open_checkpoint
from llmq.checkpoint import verify as verify_checkpoint
from llmq.progress import SILENT, Progress


def describe_checkpoint(path: str, *, verify: bool = False, progress: Progress = SILENT) -> Description:
    """Explain a checkpoint of any known kind from its headers.

    Args:
        path: folder or file.
        verify: read all weights too: hashes as recorded (for llmq's own artefacts), no NaN, shapes as configured.
        progress: is told how far verifying is.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    checkpoint = open_checkpoint(path)
    description = describe(checkpoint)
    if verify:
        verify_checkpoint(checkpoint, progress=progress)
    return description
