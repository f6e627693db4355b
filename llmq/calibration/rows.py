"""Rows of a dataset, from wherever they are: in memory, a local file of JSON, a folder of `save_to_disk`, or the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmq.errors import TextError

HUB = "hf:"
"""Before the name of a dataset of the hub, where a name alone would be a path: hf:NAME or hf:NAME:CONFIG."""
_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FOLDER_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
_HEAD_CHARS = 1 << 16


def is_rows(path: Path) -> bool:
    """Return whether a local file or folder holds rows, and not a plain text: by its content, and for JSON by its name too.

    A text whose first line is a JSON object is a file of rows. Raises TextError when the file cannot be read.
    """
    if path.is_dir():
        return any((path / mark).is_file() for mark in _FOLDER_MARKS)
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(_HEAD_CHARS)
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}; name a text or a file of rows.") from error
    try:
        decoded, _ = json.JSONDecoder().raw_decode(head.lstrip())
    except ValueError:
        return False
    return isinstance(decoded, dict)


def open_dataset(dataset: Any, split: str) -> tuple[Sequence[dict[str, Any]], str]:
    """Return the rows of a dataset, and its name.

    Args:
        dataset: a `datasets.Dataset`, any sequence of dicts, a local file of JSON (one object a line, or one list), a folder
            that `save_to_disk` wrote, or what `datasets.load_dataset` takes, as NAME, `hf:NAME` or `hf:NAME:CONFIG`.
        split: of a dataset that has several.

    Raises:
        TextError: it cannot be loaded, or has no such split.
    """
    if not isinstance(dataset, str | Path):
        return dataset, getattr(getattr(dataset, "info", None), "dataset_name", None) or "in memory"
    named = str(dataset)
    path = None if named.startswith(HUB) else Path(dataset)
    if path is not None and path.is_file():
        return read_rows(path), path.name
    import datasets

    name, _, config = named.removeprefix(HUB).partition(":") if path is None else (named, "", "")
    try:
        if path is not None and path.is_dir():
            loaded = datasets.load_from_disk(named)
        else:
            loaded = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:  # every error of the hub is an OSError
        raise TextError(
            f"dataset {name} cannot be loaded ({error}); name a local JSON Lines file, a folder of save_to_disk, or a dataset "
            "that this machine can reach."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TextError(f"dataset {name} has no split {split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[split]
    return loaded, path.name if path is not None and path.is_dir() else named.removeprefix(HUB)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines, one object a line, or one JSON list of objects.

    Raises:
        TextError: the file cannot be read, or holds something else; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read dataset {path}: {error}.") from error
    if text.lstrip().startswith("["):
        whole = _parse_list(text)
        if whole is not None:
            return whole
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(
                f"line {number} of {path} is not JSON ({error.msg}); a dataset file has one object a line."
            ) from error
        if not isinstance(row, dict):
            raise TextError(f"line {number} of {path} is not a JSON object; a dataset file has one object a line.")
        rows.append(row)
    return rows


def _parse_list(text: str) -> list[dict[str, Any]] | None:
    """Return a JSON list of objects; None when the text is something else, which its lines will say better."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    return whole if isinstance(whole, list) and all(isinstance(row, dict) for row in whole) else None
