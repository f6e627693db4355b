"""Replacing a file of records as a whole, with the token figures beside it; `store` only ever appends."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from llmq.errors import OutputError
from llmq.files import atomic_path
from llmq.results.record import ResultRecord
from llmq.results.store import append_records


def replace_records(path: Path, records: Sequence[ResultRecord]) -> None:
    """Write records to `path` and their token figures beside it, over earlier ones.

    Whenever this stops, the file is the old one or the new one, and the figures that it names are there: they are named by their
    hash, so new ones come first, then the file, and what nothing names any more goes last.

    Raises:
        OutputError: something cannot be written.
    """
    folder = path.with_suffix(".tokens")
    with atomic_path(path, force=True) as temporary:
        try:
            staging = temporary.with_name(f"{temporary.name}.d")
            shutil.rmtree(staging, ignore_errors=True)
            append_records(staging / path.name, records)
            staged = (staging / path.name).with_suffix(".tokens")
            fresh = sorted(staged.iterdir()) if staged.is_dir() else []
            if fresh:
                folder.mkdir(exist_ok=True)
            for figures in fresh:
                figures.replace(folder / figures.name)
            (staging / path.name).replace(temporary)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}; check the folder and the free space.") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    named = {figures.name for figures in fresh}
    for figures in folder.glob("*.safetensors"):
        if figures.name not in named:
            figures.unlink()
