"""A matrix on disk: what is finished stays finished, whatever happens to the process.

    FOLDER/matrix.json               what is measured with what: a run may go on only when all of it is the same
    FOLDER/runs.jsonl                the records of finished cells, replaced whole whenever one more is finished
    FOLDER/runs.tokens/              the figures of their tokens
    FOLDER/calibration/              recorded sets, one of each name and seed

Every file is written under a temporary name and renamed when it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmq.checkpoint.job import differences
from llmq.errors import InputError, OutputError, UsageError
from llmq.files import atomic_path, lock_folder
from llmq.results.record import ResultRecord
from llmq.results.store import put_tokens, read_records, read_tokens, to_json_line

_FILE, _RUNS, _CALIBRATION = "matrix.json", "runs.jsonl", "calibration"
_HASH = "recipe_sha256"
"""In the identity for those who look for a recipe's folder; what differs is said by the recipe itself."""


class MatrixFolder:
    """The folder of one matrix, which one process at a time works in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / _RUNS

    def calibration(self, name: str, seed: int) -> Path:
        """Where the calibration set of that name and seed is, or belongs."""
        return self.folder / _CALIBRATION / f"{name}-seed{seed}.safetensors"

    def records(self) -> list[ResultRecord]:
        """Return the records of finished cells, without their token figures."""
        return read_records(self.runs) if self.runs.exists() else []

    def records_with_tokens(self) -> list[ResultRecord]:
        """The same with them; raises InputError when they are lost."""
        return [record.with_tokens(read_tokens(self.runs, record)) for record in self.records()]

    def add(self, records: Sequence[ResultRecord]) -> None:
        """Keep the records of one more cell: all of them or, if the process dies meanwhile, none.

        Raises:
            OutputError: they cannot be written.
        """
        put_tokens(self.runs, records)  # first, so that no record names what is not there
        before = self.runs.read_text(encoding="utf-8") if self.runs.exists() else ""
        _write(self.runs, before + "".join(f"{to_json_line(record)}\n" for record in records))


@contextmanager
def open_folder(folder: Path, identity: Mapping[str, Any], *, restart: bool = False) -> Iterator[MatrixFolder]:
    """Begin a matrix in a folder, or go on with it, and keep other processes out meanwhile.

    Args:
        folder: where; made when it is absent.
        identity: plain data: everything that the figures depend on.
        restart: throw away what an earlier run has measured.

    Raises:
        UsageError: what is there belongs to another recipe, model or machine; names the differences.
        OutputError: the folder holds what llmq did not put there, cannot be written, or another process works in it.
    """
    wanted = json.loads(json.dumps(identity))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror or error}; choose another --out.") from error
    try:
        _refuse_foreign(folder)
        for rubbish in folder.rglob(".*.tmp"):  # of a process that was killed
            rubbish.unlink()
        found = None if restart else _read(folder / _FILE)
        if found is None:
            _empty(folder)
            _write(folder / _FILE, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
        elif different := differences({**found, _HASH: None}, {**wanted, _HASH: None}):
            raise UsageError(
                f"{folder} holds another matrix: {'; '.join(different)}. Choose another --out, or throw that one away with "
                "--restart."
            )
        yield MatrixFolder(folder)
    finally:
        os.close(lock)


def _refuse_foreign(folder: Path) -> None:
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tmp"))
    if foreign and not (folder / _FILE).exists():
        raise OutputError(f"{folder} holds {foreign[0]}, and no matrix; choose an empty folder, or a new one.")


def _empty(folder: Path) -> None:
    """Remove what a matrix has measured: the records first, so that none names what is gone."""
    (folder / _RUNS).unlink(missing_ok=True)
    for name in (Path(_RUNS).with_suffix(".tokens").name, _CALIBRATION):
        shutil.rmtree(folder / name, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}); restore it, or begin anew with --restart.") from error
    return data


def _write(path: Path, text: str) -> None:
    with atomic_path(path, force=True) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
