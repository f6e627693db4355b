"""How long-running library code says how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """`with progress.task("calibrating", total=8) as advance: ... advance(1)`."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a task of `total` steps; the context's value is called with the number of steps just done."""
        ...

    def note(self, message: str) -> None:
        """Tell the user one fact that is worth a line (a fallback taken, a source chosen)."""
        ...


class Silent:
    """The listener that hears nothing: the default in the library."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `Progress.task`."""
        yield lambda steps: None

    def note(self, message: str) -> None:
        """See `Progress.note`."""


SILENT = Silent()


class Named:
    """A listener that says what each task is for: 'int4: perplexity'."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name = name
        self._progress = progress

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """See `Progress.task`."""
        return self._progress.task(f"{self._name}: {description}", total)

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        self._progress.note(f"{self._name}: {message}")
