"""Running the command line in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from llmq.cli.app import app


def run_llmq(*arguments: object, code: int = 0) -> Result:
    """Run a command; it must end with `code`, and without a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"exit {result.exit_code}: {result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


def records_of(result: Result) -> list[dict[str, Any]]:
    """The records that `--json` printed on standard output."""
    records: list[dict[str, Any]] = json.loads(result.stdout)["records"]
    return records
