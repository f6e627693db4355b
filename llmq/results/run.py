"""Run: records that belong together, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmq.results.record import ResultRecord
from llmq.results.store import read_records, read_tokens
from llmq.results.tokens import TokenFigures


@dataclass(frozen=True)
class Run:
    """The records of one measurement, or of several that were kept in one place.

    Attributes:
        name: as the user named it.
        records: in the order in which they were made.
        tokens_of: returns the token figures of one of them, None where it has none; raises InputError when they are lost.
    """

    name: str
    records: tuple[ResultRecord, ...]
    tokens_of: Callable[[ResultRecord], TokenFigures | None]


def read_run(path: Path) -> Run:
    """Return the run in a file of records.

    Raises:
        InputError: see `read_records`.
    """
    return Run(str(path), tuple(read_records(path)), partial(read_tokens, path))


def run_in_memory(name: str, records: list[ResultRecord]) -> Run:
    """Return the run of records that were just made, and hold their token figures."""
    return Run(name, tuple(records), lambda record: record.tokens)
