"""Tables of stored records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmq.results.store import read_records
from llmq.results.table import Table, comparison_table


def table_of(paths: Sequence[Path]) -> Table:
    """Make the comparison table of every record in `paths`.

    Raises:
        InputError: a file is missing or damaged.
        UsageError: the records must not share a table.
    """
    return comparison_table([record for path in paths for record in read_records(path)])
