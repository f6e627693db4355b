"""Runs by name: a file of records, a history of its own, or a run in history."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from llmq.errors import InputError, UsageError
from llmq.results.history import VARIABLE, history_path, open_history
from llmq.results.run import Run, read_run

_SQLITE = b"SQLite format 3\0"

_LIKE_A_RUN = re.compile(r"latest(~\d+)?|[0-9a-fA-F]{2,32}")


def open_run(spec: str) -> Run:
    """Return the run that `spec` names.

    Args:
        spec: a file of records (`--record` wrote it), a database that holds one run, or a run in history: the beginning of its
            id, `latest`, or `latest~N` for the Nth before it. A file of that name goes before a run.

    Raises:
        UsageError: no run is named so, or several are, or history is off.
        InputError: the file is absent or damaged.
    """
    path = Path(spec)
    if path.is_file():
        return _only_run(path) if _is_database(path) else read_run(path)
    if path.is_dir():
        inside = _quoted(sorted(path.glob("*.jsonl")))
        raise UsageError(f"{spec} is a folder; name a file of records" + (f" in it, such as {inside}." if inside else "."))
    if not _LIKE_A_RUN.fullmatch(spec):
        raise InputError(f"there is no file {spec}, and a run in history is named by the beginning of its id.{_hint(path)}")
    history = history_path()
    if history is None:
        raise UsageError(f"{spec} names a run in history, and history is off ({VARIABLE}); name a file of records.")
    with open_history(history) as opened:
        return opened.load(opened.find(spec))


def _only_run(path: Path) -> Run:
    with open_history(path) as opened:
        runs = opened.runs()
        if len(runs) != 1:
            raise UsageError(f"{path} holds {len(runs)} runs; name one of them by its id, with `llmq --history {path} …`.")
        return opened.load(runs[0])


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check its permissions.") from error


def _hint(path: Path) -> str:
    """Return ' Did you mean …?' for a file beside `path` that is named much like it, or how to see the runs."""
    folder = path.parent if path.parent.is_dir() else Path()
    names = ["latest", *(each.name for each in folder.iterdir() if each.is_file())]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.with_name(close[0])}?" if close else " `llmq history list` shows the runs."


def _quoted(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:3]))
