"""How a matrix is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.cli.render.console import print_json, stdout
from llmq.cli.render.tables import table

if TYPE_CHECKING:
    from llmq.api.matrix import MatrixResult


def matrix(result: MatrixResult, *, json: bool) -> None:
    """Show one row a cell, and what can be done with the records."""
    if json:
        records = [record.model_dump(mode="json") for record in result.records]
        print_json({"rows": [row.to_json() for row in result.rows], "records": records})
        return
    table(result.table)
    stdout().print(f"\nrecords: {result.file}; as a page: llmq report html {result.file} -o matrix.html", soft_wrap=True)
