"""The SQLite file that history is kept in: opening it, its layout, and bringing an older layout up to date."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from llmq.errors import InputError, OutputError

BUSY_S = 60.0
"""How long a process waits for others that write; a run takes milliseconds."""

_APPLICATION_ID = 0x6C6C6D71
"""'llmq' in ASCII: what tells this database from those of other programs."""

_VERSION_1 = (
    """CREATE TABLE runs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        created_at TEXT NOT NULL,
        command TEXT NOT NULL,
        llmq TEXT NOT NULL,
        note TEXT NOT NULL
    )""",
    """CREATE TABLE records (
        id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        kind TEXT NOT NULL,
        scheme TEXT NOT NULL,
        model TEXT NOT NULL,
        created_at TEXT NOT NULL,
        tokens_sha256 TEXT,
        json TEXT NOT NULL,
        UNIQUE (run_id, position)
    )""",
    "CREATE INDEX records_by_tokens ON records (tokens_sha256)",
    "CREATE TABLE tokens (sha256 TEXT PRIMARY KEY, data BLOB NOT NULL)",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1,)
"""Statement by statement, what makes version i + 1 of version i; the first makes the tables."""


@contextmanager
def open_database(path: Path, *, create: bool) -> Iterator[sqlite3.Connection]:
    """Yield a connection in autocommit mode to a database of the newest layout; close it afterwards.

    The rollback journal is kept, not the write-ahead log: one file at rest, and readers wait milliseconds for a writer.

    Args:
        path: the file.
        create: make it and its folder where it is absent; otherwise an absent file reads as an empty one.

    Raises:
        InputError: it is no database, damaged, of another program or of a newer llmq.
        OutputError: it cannot be opened or written, or others kept it locked for `BUSY_S`.
    """
    if not create and not path.exists():
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
            _migrate(empty, path)
            yield empty
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {path.parent} for history: {error.strerror or error}; name another file.") from error
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            _migrate(connection, path)
            yield connection
    except sqlite3.Error as error:
        raise _in_words(error, path) from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write everything in the block, or nothing; no other process writes meanwhile."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the layout up to date, in one transaction."""
    connection.execute("BEGIN")  # both numbers of one moment: another process may be making the tables
    try:
        version = _version(connection, path)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    if version == len(MIGRATIONS):
        return
    if version == 0:
        connection.execute("PRAGMA auto_vacuum = FULL")  # what is deleted gives its space back
    with transaction(connection):
        for statements in MIGRATIONS[_version(connection, path) :]:  # asked again: another process may have been first
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the layout, 0 for an empty file; raises InputError where it is not ours, or too new."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != _APPLICATION_ID:
        raise InputError(f"{path} is a database of another program; name another file with --history or LLMQ_HISTORY.")
    if version > len(MIGRATIONS):
        raise InputError(
            f"history {path} has version {version} of its layout, and this llmq knows up to {len(MIGRATIONS)}; use the llmq that "
            "wrote it, or name another file with --history or LLMQ_HISTORY."
        )
    return int(version)


def _in_words(error: sqlite3.Error, path: Path) -> InputError | OutputError:
    if error.sqlite_errorname in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return InputError(f"history {path} is damaged, or no database ({error}); restore it, or move it away to begin anew.")
    if error.sqlite_errorname == "SQLITE_BUSY":
        return OutputError(f"history {path} was locked by another process for {BUSY_S:.0f} s; try again when it has finished.")
    return OutputError(f"cannot use history {path}: {error}; check the file, its folder and the free space.")
