"""What is done with history: looking at runs, taking them out and putting them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import UsageError
from llmq.files import atomic_path, check_absent
from llmq.results.history import VARIABLE, History, Saved, StoredRun, history_path, open_history
from llmq.results.record import ResultRecord
from llmq.results.run import Run, read_run
from llmq.results.store import put_tokens, to_json_line, tokens_path


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs: those with a record of this model, scheme and kind; None asks nothing."""

    model: str | None = None
    scheme: str | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a file; `bare` records name token figures that are not beside it."""

    path: Path
    saved: Saved
    bare: int


def list_runs(asked: RunFilter, limit: int | None = None) -> list[StoredRun]:
    """Return the newest runs, newest first.

    Raises:
        UsageError: history is off.
    """
    with opened_history() as history:
        return history.runs(model=asked.model, scheme=asked.scheme, kind=asked.kind, limit=limit)


def show_run(spec: str) -> tuple[StoredRun, Run]:
    """Return one run and what is known of it; see `History.find` for the spec and errors."""
    with opened_history() as history:
        stored = history.find(spec)
        return stored, history.load(stored)


def export_runs(specs: Sequence[str], out: Path, *, force: bool = False) -> int:
    """Write the records of runs to a JSONL file, their token figures beside it, and return how many there are.

    Raises:
        UsageError: a run is not there, see `History.find`.
        InputError: token figures are lost.
        OutputError: `out` exists and `force` is not set, or it cannot be written.
    """
    check_absent(out, force=force)
    with opened_history() as history:
        runs = {stored.id: history.load(stored) for stored in map(history.find, specs)}
    records = [record.with_tokens(run.tokens_of(record)) for run in runs.values() for record in run.records]
    put_tokens(out, records)  # first, so that no record names what is not there
    with atomic_path(out, force=force) as temporary:
        temporary.write_text("".join(f"{to_json_line(record)}\n" for record in records), encoding="utf-8")
    return len(records)


def import_files(paths: Sequence[Path], *, command: str, note: str = "") -> list[Imported]:
    """Keep the records of files, as a run each that is as old as its newest record; what is there already stays as it is.

    Raises:
        InputError: a file, or token figures beside it, are damaged; nothing is imported then.
    """
    read = [_read(path) for path in paths]
    found = []
    with opened_history(create=True) as history:
        for path, (records, bare) in zip(paths, read, strict=True):
            newest = max((record.created_at for record in records), default=None)
            saved = history.save(records, command=command, note=note, created_at=newest)
            found.append(Imported(path, saved, bare))
    return found


def delete_run(spec: str) -> StoredRun:
    """Forget a run, and return what it was; see `History.find` for the spec and errors."""
    with opened_history() as history:
        stored = history.find(spec)
        history.delete(stored.id)
    return stored


def annotate_run(spec: str, note: str) -> StoredRun:
    """Replace the note of a run; see `History.find` for the spec and errors."""
    with opened_history() as history:
        stored = history.find(spec)
        history.annotate(stored.id, note)
    return stored


@contextmanager
def opened_history(*, create: bool = False) -> Iterator[History]:
    """Open the user's history; raises UsageError when it is off."""
    path = history_path()
    if path is None:
        raise UsageError(f"history is off; name its file with --history or {VARIABLE}.")
    with open_history(path, create=create) as history:
        yield history


def _read(path: Path) -> tuple[list[ResultRecord], int]:
    """Return the records of a file, and how many of them name token figures that are not there."""
    run = read_run(path)
    records, bare = [], 0
    for record in run.records:
        lost = record.tokens_sha256 is not None and not tokens_path(path, record.tokens_sha256).exists()
        bare += lost
        records.append(record if lost else record.with_tokens(run.tokens_of(record)))
    return records, bare
