"""The command line: each command parses, makes one api call, and hands the result to `render`."""

from __future__ import annotations


def main() -> None:
    """Run `llmq`; the entry point of the installed script."""
    from llmq.cli.app import app

    app(prog_name="llmq")
