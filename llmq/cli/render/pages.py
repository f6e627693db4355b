"""What was written of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from llmq.cli.render.console import stdout
from llmq.results.figures import size


def pages_written(paths: Sequence[Path]) -> None:
    """Name the files, and how large they are."""
    for path in paths:
        stdout().print(f"{escape(str(path))} [dim]({size(path.stat().st_size)})[/dim]", soft_wrap=True)
