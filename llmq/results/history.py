"""History: every run that was measured, with its records and their token figures, in one SQLite file.

A run is written in one transaction: killed at any moment, it is there whole or not at all. Any number of processes may write.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

import platformdirs

import llmq
from llmq.errors import InputError, UsageError
from llmq.results.database import open_database, transaction
from llmq.results.record import ResultRecord
from llmq.results.run import Run
from llmq.results.store import parse_line, to_json_line
from llmq.results.tokens import TokenFigures, parse_tokens

VARIABLE = "LLMQ_HISTORY"
"""Environment variable: the file; empty or 'off' for none."""

SHORT = 8
"""Digits of an id that are shown; any beginning that no other run shares will do."""

_LATEST = re.compile(r"latest(?:~(\d+))?")
_ID = re.compile(r"[0-9a-f]{2,32}")


@dataclass(frozen=True, slots=True)
class StoredRun:
    """What `llmq history list` says of a run.

    Attributes:
        id: 32 hexadecimal digits.
        created_at: when it was measured, UTC.
        command: as it was typed.
        llmq: the version that measured it.
        note: the user's; may be empty.
        records: how many it has.
        models: each once, in their order; so are `schemes` and `kinds`.
    """

    id: str
    created_at: datetime
    command: str
    llmq: str
    note: str
    records: int
    models: tuple[str, ...]
    schemes: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def short(self) -> str:
        """The beginning of the id, as it is shown."""
        return self.id[:SHORT]


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of records that were to be kept.

    Attributes:
        run: id of the run that holds them; None where there were none, or where several runs hold them already.
        added: how many were new.
        known: how many history had already.
    """

    run: str | None
    added: int
    known: int


def history_path(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return where history is kept: `LLMQ_HISTORY`, else the platform's folder for data; None where it is off."""
    named = environment.get(VARIABLE)
    if named is None:
        return platformdirs.user_data_path("llmq", appauthor=False) / "history.db"
    return None if named.strip() in ("", "off") else Path(named).expanduser()


@contextmanager
def open_history(path: Path, *, create: bool = False) -> Iterator[History]:
    """Open the history in a file; an absent one reads as empty, and is only made to `create` it.

    Raises:
        InputError, OutputError: see `open_database`.
    """
    with open_database(path, create=create) as connection:
        yield History(path, connection)


class History:
    """The runs in one open file."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def save(self, records: Sequence[ResultRecord], *, command: str, note: str = "", created_at: datetime | None = None) -> Saved:
        """Keep records as one run, without those (by id) that are kept already.

        Args:
            records: with their token figures, where they have any.
            command: that made them.
            note: anything.
            created_at: when they were measured; None: now.

        Raises:
            OutputError: a record cannot be read back (a metric that is not finite), or see `open_database`.
        """
        lines = [to_json_line(record) for record in records]
        run = uuid4().hex
        with transaction(self._connection):
            holders = [self._holder(record) for record in records]
            for tokens in (
                record.tokens for record in records if record.tokens is not None
            ):  # also of records that had lost them
                values = (tokens.sha256, tokens.data)
                self._connection.execute("INSERT OR IGNORE INTO tokens (sha256, data) VALUES (?, ?)", values)
            new = [index for index, holder in enumerate(holders) if holder is None]
            if not new:
                return Saved(holders[0] if len(set(holders)) == 1 else None, 0, len(records))
            moment = (created_at or datetime.now(UTC)).astimezone(UTC).isoformat()
            insert = "INSERT INTO runs (id, created_at, command, llmq, note) VALUES (?, ?, ?, ?, ?)"
            self._connection.execute(insert, (run, moment, command, llmq.__version__, note))
            for position, index in enumerate(new):
                self._insert(run, position, records[index], lines[index])
        return Saved(run, len(new), len(records) - len(new))

    def runs(
        self, *, model: str | None = None, scheme: str | None = None, kind: str | None = None, limit: int | None = None
    ) -> list[StoredRun]:
        """Return the runs that have a record of this model, scheme and kind, newest first, at most `limit`."""
        asked = {"model": model, "scheme": scheme, "kind": kind}
        conditions = "".join(f" AND r.{column} = :{column}" for column, value in asked.items() if value is not None)
        query = (
            f"SELECT id, created_at, command, llmq, note FROM runs WHERE EXISTS "  # noqa: S608 - the names are those above
            f"(SELECT 1 FROM records r WHERE r.run_id = runs.id{conditions}) ORDER BY created_at DESC, number DESC LIMIT :limit"
        )
        rows = self._connection.execute(query, {**asked, "limit": -1 if limit is None else limit}).fetchall()
        return [self._described(row) for row in rows]

    def find(self, spec: str) -> StoredRun:
        """Return the run that `spec` names: the beginning of its id, `latest`, or `latest~N` for the Nth before it.

        Raises:
            UsageError: there is none, or there are several.
        """
        runs = self.runs()
        if not runs:
            raise UsageError(f"history {self.path} holds no runs, so {spec!r} names none; measure something first.")
        if latest := _LATEST.fullmatch(spec):
            back = int(latest[1] or 0)
            if back >= len(runs):
                raise UsageError(f"{spec} is before the first of {len(runs)} runs; `llmq history list` shows them.")
            return runs[back]
        found = [run for run in runs if run.id.startswith(spec.lower())] if _ID.fullmatch(spec.lower()) else []
        if len(found) > 1:
            names = ", ".join(run.short for run in found[:4])
            raise UsageError(f"{spec!r} is the beginning of {len(found)} runs ({names}); write more of it.")
        if not found:
            raise UsageError(
                f"no run {spec!r} in history {self.path}; name one as `llmq history list` shows it (the newest is "
                f"{runs[0].short}), or latest, or latest~1 for the one before."
            )
        return found[0]

    def load(self, stored: StoredRun) -> Run:
        """Return a run with its records; their token figures are read when they are asked for.

        Raises:
            InputError: a record is damaged, or of a newer schema.
        """
        query = "SELECT json FROM records WHERE run_id = ? ORDER BY position"
        where = f"{self.path} run {stored.short} record"
        lines = [line for (line,) in self._connection.execute(query, (stored.id,))]
        records = tuple(parse_line(line, f"{where} {number}") for number, line in enumerate(lines, start=1))
        return Run(stored.short, records, partial(_tokens, self.path))

    def delete(self, run: str) -> None:
        """Forget a run by its id, and the token figures that no other run has."""
        with transaction(self._connection):
            self._connection.execute("DELETE FROM runs WHERE id = ?", (run,))
            self._connection.execute(
                "DELETE FROM tokens WHERE NOT EXISTS (SELECT 1 FROM records r WHERE r.tokens_sha256 = tokens.sha256)"
            )

    def annotate(self, run: str, note: str) -> None:
        """Replace the note of a run by its id."""
        with transaction(self._connection):
            self._connection.execute("UPDATE runs SET note = ? WHERE id = ?", (note, run))

    def _holder(self, record: ResultRecord) -> str | None:
        row = self._connection.execute("SELECT run_id FROM records WHERE id = ?", (record.id,)).fetchone()
        return None if row is None else str(row[0])

    def _put_tokens(self, records: Sequence[ResultRecord]) -> None:
        for tokens in (record.tokens for record in records if record.tokens is not None):
            values = (tokens.sha256, tokens.data)
            self._connection.execute("INSERT OR IGNORE INTO tokens (sha256, data) VALUES (?, ?)", values)

    def _insert(self, run: str, position: int, record: ResultRecord, line: str) -> None:
        columns = "id, run_id, position, kind, scheme, model, created_at, tokens_sha256, json"
        subject, moment = record.subject, record.created_at.astimezone(UTC).isoformat()
        row = (record.id, run, position, record.kind, subject.scheme, subject.model, moment, record.tokens_sha256, line)
        self._connection.execute(f"INSERT INTO records ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)  # noqa: S608

    def _described(self, row: tuple[str, str, str, str, str]) -> StoredRun:
        query = "SELECT model, scheme, kind FROM records WHERE run_id = ? ORDER BY position"
        found = self._connection.execute(query, (row[0],)).fetchall()
        models, schemes, kinds = (tuple(dict.fromkeys(column)) for column in zip(*found, strict=True))
        return StoredRun(row[0], datetime.fromisoformat(row[1]), *row[2:], len(found), models, schemes, kinds)


def _tokens(path: Path, record: ResultRecord) -> TokenFigures | None:
    """Return the token figures of a record in history; None for a record that has none."""
    if record.tokens_sha256 is None:
        return None
    with open_database(path, create=False) as connection:
        row = connection.execute("SELECT data FROM tokens WHERE sha256 = ?", (record.tokens_sha256,)).fetchone()
    if row is None:
        raise InputError(
            f"history {path} does not hold the token figures of the {record.kind} record of {record.subject.scheme}: they were "
            "not beside the file that it was imported from, or the run was deleted; import both, or measure again."
        )
    return parse_tokens(row[0], record.tokens_sha256, f"history {path}")
