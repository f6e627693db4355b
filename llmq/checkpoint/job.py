"""A quantization under way, on disk: whatever happens to the process, what is finished stays finished.

    OUT.partial/job.json             what is made of what: a run may go on only when all of it is the same
    OUT.partial/parts/NAME.*         a part's tensors (.safetensors), and what else is known of it (.json), written last
    OUT.partial/factors/             statistics of the whole model, where a scheme needs them
    OUT.partial/artefact/            the result, put together from the parts; renamed to OUT when it is complete

Every file is written under a temporary name and renamed when it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.detect import open_checkpoint
from llmq.checkpoint.manifest import Manifest, StoredFile
from llmq.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from llmq.checkpoint.source import Checkpoint
from llmq.checkpoint.store import compare_stored, shard_names, write_descriptions, write_index
from llmq.errors import OutputError, UsageError
from llmq.files import check_absent, sha256_file
from llmq.model.config import LlamaConfig

ONE_FILE_BYTES = 64 << 20
"""Results up to this size are put into one file; larger ones keep a file for each part, which nobody has to copy."""


class Job:
    """The folder of one quantization.

    Attributes:
        out: what is to be made.
        folder: where it is being made.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, force: bool, restart: bool = False) -> None:
        """Begin, or go on with what an earlier run of the same job has finished.

        Args:
            out: the folder to make.
            identity: plain data: everything that the result's bytes depend on.
            force: `out` may exist, and is replaced at the end.
            restart: throw away what an earlier run has left.

        Raises:
            OutputError: `out` exists and `force` is not set, or the folder cannot be made.
            UsageError: what an earlier run left belongs to another job; names the differences.
        """
        check_absent(out, force=force)
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self._parts = self.folder / "parts"
        if restart and self.folder.is_dir():
            shutil.rmtree(self.folder)
        wanted = json.loads(json.dumps(identity))
        file = self.folder / "job.json"
        if file.is_file():
            _check_same(json.loads(file.read_text(encoding="utf-8")), wanted, self.folder)
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                _write_text(file, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise self._failed("job.json", error) from error

    @property
    def finished(self) -> list[str]:
        """Names of the parts that are finished."""
        return sorted(path.stem for path in self._parts.glob("*.json"))

    def entry(self, part: str) -> dict[str, Any] | None:
        """Return what is known of a finished part; None: it is not finished.

        Raises:
            OutputError: its tensors are not those that were written.
        """
        file = self._parts / f"{part}.json"
        if not file.is_file():
            return None
        entry: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        weights = self._weights(part)
        if not weights.is_file() or sha256_file(weights) != entry["sha256"]:
            raise OutputError(f"{weights} is not what was written there; begin anew with --restart.")
        return entry

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a finished part, mapped from their file."""
        file = SafetensorsFile(self._weights(part))
        return {name: file.read(name) for name in file.entries}

    def store(self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a part, read it again and compare every bit; only then it is finished.

        Raises:
            OutputError: it cannot be written; everything that was finished before stays.
        """
        weights = self._weights(part)
        temporary = weights.with_name(weights.name + ".tmp")
        try:
            write_safetensors(temporary, tensors)
            _sync(temporary)
            file = SafetensorsFile(temporary)
            compare_stored(file.read, tensors, temporary)
            file.release()
            temporary.replace(weights)
            entry = {"sha256": sha256_file(weights), "nbytes": weights.stat().st_size, **facts}
            _write_text(self._parts / f"{part}.json", json.dumps(entry, ensure_ascii=False))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._failed(weights.name, error) from error

    def put_together(self, parts: list[str], manifest: Manifest, config: LlamaConfig, source: Checkpoint) -> Checkpoint:
        """Make the artefact of all parts, put it in its place, and clear up.

        Args:
            parts: names, in the model's order; all are finished.
            manifest: complete but for `weights`.
            config: of the model as it is stored.
            source: the original.

        Raises:
            OutputError: the disk is full, or the result does not open.
        """
        artefact = self.folder / "artefact"
        try:
            shutil.rmtree(artefact, ignore_errors=True)
            artefact.mkdir()
            files = self._gather_weights(artefact, parts)
            write_descriptions(artefact, manifest.model_copy(update={"weights": files}), config, source)
            open_checkpoint(artefact)
            for path in artefact.iterdir():
                path.chmod(0o666 & ~_umask())
                _sync(path)
            if self.out.exists():
                aside = self.out.with_name(f".{self.out.name}.{os.getpid()}.old")
                self.out.rename(aside)
                artefact.rename(self.out)
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            else:
                artefact.rename(self.out)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise self._failed("the result", error) from error
        return open_checkpoint(self.out)

    def _gather_weights(self, artefact: Path, parts: list[str]) -> dict[str, StoredFile]:
        held = {part: SafetensorsFile(self._weights(part)) for part in parts}
        sizes = {part: sum(info.nbytes for info in file.entries.values()) for part, file in held.items()}
        parts = [part for part in parts if sizes[part]]
        if sum(sizes.values()) <= ONE_FILE_BYTES:
            name = shard_names(1)[0]
            tensors = {tensor: held[part].read(tensor) for part in parts for tensor in held[part].entries}
            write_safetensors(artefact / name, tensors)
            path = artefact / name
            return {name: StoredFile(sha256=sha256_file(path), nbytes=path.stat().st_size)}
        names = shard_names(len(parts))
        files = {}
        for part, name in zip(parts, names, strict=True):
            # a second name of the same bytes: the part stays finished until the whole result is in its place
            os.link(self._weights(part), artefact / name)
            entry = self.entry(part)
            assert entry is not None
            files[name] = StoredFile(sha256=entry["sha256"], nbytes=entry["nbytes"])
        write_index(artefact, {name: held[part].entries for part, name in zip(parts, names, strict=True)})
        return files

    def _weights(self, part: str) -> Path:
        return self._parts / f"{part}.safetensors"

    def _failed(self, what: str, error: OSError) -> OutputError:
        done = len(self.finished)
        going_on = f"; run the same again when there is room: it goes on after the {done} parts in {self.folder}" if done else ""
        return OutputError(f"cannot write {what} to {self.folder}: {error.strerror or error}{going_on}.")


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if different:
        what = "; ".join(f"{key} was {_short(found.get(key))}, is {_short(wanted.get(key))}" for key in different)
        raise UsageError(
            f"{folder} holds an unfinished job that differs: {what}. Run that one again to finish it, choose another --out, or "
            "throw it away with --restart."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)  # the only way to ask is to set it
    os.umask(mask)
    return mask
