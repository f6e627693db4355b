"""The command line that is running: what a run in history says it was made by, and where history is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_ARGUMENTS: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())


@contextmanager
def running(arguments: Sequence[str], history: str | None) -> Iterator[None]:
    """Remember the arguments of `llmq` for the time of the command, and let `--history` go before the environment."""
    token = _ARGUMENTS.set(tuple(arguments))
    try:
        with _history(history):
            yield
    finally:
        _ARGUMENTS.reset(token)


def command() -> str:
    """Return the command as it was typed, quoted where a shell needs it."""
    return shlex.join(["llmq", *_ARGUMENTS.get()])


@contextmanager
def _history(named: str | None) -> Iterator[None]:
    if named is None:
        yield
        return
    from llmq.results.history import VARIABLE  # brings numpy

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = named
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
