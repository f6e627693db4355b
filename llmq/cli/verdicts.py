"""How `llmq report diff` and `llmq ci` end: their exit codes are verdicts, so that a pipeline can tell them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from llmq.errors import GateError, Interrupted

EXIT_CODES = (
    "Exit codes of this command: 0 fine · 1 regression · 2 not comparable (another protocol, text or tokenizer) · "
    "3 could not run (a missing or damaged file, a wrong option of a recipe, an internal error) · 130 interrupted."
)


@contextmanager
def could_not_run() -> Iterator[None]:
    """Turn every error into a `GateError`, so that none is taken for a verdict."""
    try:
        yield
    except (GateError, Interrupted, typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        raise GateError(str(error) or type(error).__name__) from error
