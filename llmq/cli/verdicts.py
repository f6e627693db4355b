"""How `llmq report diff` and `llmq ci` end: their exit codes are verdicts, so that a pipeline can tell them apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from llmq.errors import GateError, Interrupted

EXIT_CODES = (
    "Exit codes of this command: 0 fine · 1 regression · 2 not comparable (another protocol, text or tokenizer) · "
    "3 could not run (a missing or damaged file, a wrong option, an internal error) · 130 interrupted."
)


# typer brings its own click, or uses the installed one, depending on its version: take the class from what it exports
_WRONG_USAGE: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")


class VerdictCommand(TyperCommand):
    """A command that could not run, and did not find anything incomparable, where an option is wrong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click; a wrong option gets the exit code of a `GateError`."""
        try:
            return super().parse_args(ctx, args)
        except _WRONG_USAGE as error:
            error.exit_code = GateError.exit_code  # type: ignore[attr-defined]
            raise


@contextmanager
def could_not_run() -> Iterator[None]:
    """Turn every error into a `GateError`, so that none is taken for a verdict."""
    try:
        yield
    except (GateError, Interrupted, typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        raise GateError(str(error) or type(error).__name__) from error
