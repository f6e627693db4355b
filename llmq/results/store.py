"""A file of result records: one JSON object a line, only ever appended to, by any number of processes at once.

The figures of single tokens that records name lie beside it, in the folder NAME.tokens for NAME.jsonl, each in a file that its
hash names: the same figures are stored once, and nothing is ever written over.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from llmq.errors import InputError, OutputError
from llmq.files import atomic_path
from llmq.results.record import READABLE_VERSIONS, ResultRecord
from llmq.results.tokens import TokenFigures, parse_tokens


def append_records(path: Path, records: Sequence[ResultRecord]) -> None:
    """Append records to a file, creating it and its folder when absent. Either all are there afterwards, or none.

    Their token figures are written first, so that no record names what is not there.

    A lock (flock) keeps processes apart, one write carries all lines, and a write that ends short is taken back. A file whose
    last line was cut off (by a crash, or by hand) gets a line break first, so that one damaged line stays one.

    Raises:
        OutputError: the file cannot be written, or a record cannot be read back (a metric that is not finite).
    """
    lines = [to_json_line(record) for record in records]
    if not lines:
        return
    put_tokens(path, records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"cannot open {path} to append records: {error.strerror or error}; check the folder.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _append_locked(descriptor, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise OutputError(f"cannot append to {path}: {error.strerror or error}; check the free space.") from error
    finally:
        os.close(descriptor)  # which also gives the lock back


def read_records(path: Path) -> list[ResultRecord]:
    """Return all records of a file, in the order in which they were written.

    Raises:
        InputError: the file cannot be read, or a line is damaged or of another schema version; names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 (byte {error.start})"
        raise InputError(f"cannot read records from {path}: {reason}; name a file that `--record` wrote.") from error
    return [parse_line(line, f"{path} line {number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_many(paths: Iterable[Path]) -> list[ResultRecord]:
    """Return the records of several files, file after file."""
    return [record for path in paths for record in read_records(path)]


def tokens_path(path: Path, sha256: str) -> Path:
    """Return where the token figures of that hash lie for a file of records."""
    return path.with_suffix(".tokens") / f"{sha256[:32]}.safetensors"


def put_tokens(path: Path, records: Sequence[ResultRecord]) -> None:
    """Write the token figures that records hold beside a file of records, each that is not there yet.

    Raises:
        OutputError: they cannot be written.
    """
    for tokens in {record.tokens.sha256: record.tokens for record in records if record.tokens is not None}.values():
        beside = tokens_path(path, tokens.sha256)
        if beside.is_file() and beside.read_bytes() == tokens.data:
            continue
        with atomic_path(beside, force=True) as temporary:
            temporary.write_bytes(tokens.data)


def read_tokens(path: Path, record: ResultRecord) -> TokenFigures | None:
    """Return the token figures of a record of the file `path`; None for a record that has none.

    Raises:
        InputError: they are not there any more, or damaged.
    """
    if record.tokens_sha256 is None:
        return None
    beside = tokens_path(path, record.tokens_sha256)
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise InputError(
            f"the token figures of the {record.kind} record of {record.subject.scheme} in {path} cannot be read from {beside}: "
            f"{error.strerror or error}; copy the folder along with the file, or measure again."
        ) from error
    return parse_tokens(data, record.tokens_sha256, str(beside))


def parse_line(line: str, where: str) -> ResultRecord:
    """Read one line; `where` (file and line) begins the message of any error.

    Raises:
        InputError: the line is not JSON, has another schema version, or does not fit the schema (names the first field).
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg} at column {error.colno}); delete the line, or restore it.") from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError(f"{where} is no result record: it has no schema_version; name a file that `--record` wrote.")
    if data["schema_version"] not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        raise InputError(
            f"{where} has schema_version {data['schema_version']!r}, and this llmq reads {readable}; "
            f"use the llmq that wrote it, or measure again."
        )
    try:
        return ResultRecord.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "record"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(
            f"{where} is no valid record: {field}: {first['msg']}{more}; delete the line, or measure again."
        ) from error


def to_json_line(record: ResultRecord) -> str:
    """Return a record as one line of JSON without its line break.

    Raises:
        OutputError: what would be read back is not this record.
    """
    line = record.model_dump_json()
    try:
        same = ResultRecord.model_validate_json(line) == record.with_tokens(None)
    except ValidationError:
        same = False
    if not same:
        odd = [name for name, metric in record.metrics.items() if metric.value - metric.value != 0]  # NaN or infinite
        reason = f"metric {odd[0]} is {record.metrics[odd[0]].value}" if odd else "it holds something that JSON cannot hold"
        raise OutputError(f"a {record.kind} record of {record.subject.scheme} cannot be stored: {reason}.")
    return line


def _append_locked(descriptor: int, data: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data
    try:
        written = os.write(descriptor, data)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    if written != len(data):
        os.ftruncate(descriptor, size)
        raise OSError(28, "only a part of the records could be written")
