"""The command line in one of several processes that `torchrun` started. Nothing here imports torch before it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmq.errors import Interrupted, LlmqError, PeerError, UsageError

_SHARING = [False]
"""Whether this process has begun to share work with others."""


def size() -> int:
    """Return how many processes take part in this run."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def speaks() -> bool:
    """Return whether this is the process that prints: the first."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def tells(error: BaseException) -> bool:
    """Return whether this process prints an error: the first does, and one that alone knows of it."""
    if speaks():
        return True
    known = isinstance(error, PeerError | Interrupted | KeyboardInterrupt) or (isinstance(error, LlmqError) and error.everywhere)
    return _SHARING[0] and not known  # before the work is shared, all processes do the same


def name() -> str:
    """Return how a process that is not the first begins a message; empty in the first."""
    return "" if speaks() else f"process {os.environ.get('RANK', '?')} of {size()}: "


def refuse_several() -> None:
    """Raise UsageError in one of several processes."""
    if size() > 1:
        raise UsageError(
            f"only `llmq quantize` and `llmq eval perplexity` share their work between processes, and {size()} were started; "
            "run this one without torchrun."
        )


@contextmanager
def shared() -> Iterator[None]:
    """Part from the other processes at the end of a command, however it ends."""
    _SHARING[0] = True
    try:
        yield
    finally:
        if "torch" in sys.modules:
            from llmq.ranks import leave_ranks

            leave_ranks()
