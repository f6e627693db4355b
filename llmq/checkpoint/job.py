"""A quantization under way, on disk: whatever happens to the process, what is finished stays finished.

    OUT.partial/job.json             what is made of what: a run may go on only when all of it is the same
    OUT.partial/parts/NAME.*         a part's tensors (.safetensors), and what else is known of it (.json), written last
    OUT.partial/factors/             statistics of the whole model, where a scheme needs them
    OUT.partial/artefact/            the result, put together from the parts; renamed to OUT when it is complete
    OUT.partial/result.json          which result that is; from it a kill after the renaming is told from one before
    OUT.partial/replaced             what OUT was before, with --force, until the result is in its place

Every file is written under a temporary name and renamed when it is on the disk. Without job.json the folder is rubbish.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.detect import open_checkpoint
from llmq.checkpoint.manifest import FILE_NAME, Manifest, StoredFile
from llmq.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from llmq.checkpoint.source import Checkpoint
from llmq.checkpoint.store import compare_stored, shard_names, write_descriptions, write_index
from llmq.errors import OutputError, UsageError
from llmq.files import check_absent, lock_folder, sha256_file
from llmq.model.config import LlamaConfig

ONE_FILE_BYTES = 64 << 20
"""Results up to this size are put into one file; larger ones keep a file for each part, which nobody has to copy."""


class Job:
    """The folder of one quantization, which one process at a time works in.

    Attributes:
        out: what is to be made.
        folder: where it is being made.
        placed: an earlier run of the same job got as far as putting the result in its place; only `clear_up` is left to do.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, force: bool, restart: bool = False) -> None:
        """Begin, or go on with what an earlier run of the same job has finished.

        Args:
            out: the folder to make.
            identity: plain data: everything that the result's bytes depend on.
            force: `out` may exist, and is replaced at the end.
            restart: throw away what an earlier run has left.

        Raises:
            OutputError: `out` exists and `force` is not set, the folder cannot be made, or another process works in it.
            UsageError: what an earlier run left belongs to another job; names the differences.
        """
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self._parts = self.folder / "parts"
        self._checked: set[str] = set()
        self._lock: int | None = None
        self.placed = False
        _refuse_foreign(self.folder)
        wanted = json.loads(json.dumps(identity))
        try:
            if not self.folder.is_dir():
                check_absent(out, force=force)
                self.folder.mkdir(parents=True)
            self._lock = lock_folder(self.folder)
            self._begin(wanted, force=force, restart=restart)
        except BaseException as error:
            self.release()
            with suppress(OSError):
                self.folder.rmdir()  # where there is nothing in it
            if isinstance(error, OSError):
                raise self._failed("job.json", error) from error
            raise

    def _begin(self, wanted: dict[str, Any], *, force: bool, restart: bool) -> None:
        file, replaced = self.folder / "job.json", self.folder / "replaced"
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)  # killed between the two renamings: the result's folder is still here
        found = _read_json(file)
        placed = self._placed()
        if placed == wanted and not restart:
            self.placed = True
            return
        if placed is not None:
            self._empty()
        check_absent(self.out, force=force)
        if found is not None and not restart and placed is None:
            _check_same(found, wanted, self.folder)
            self._parts.mkdir(exist_ok=True)
            return
        file.unlink(missing_ok=True)  # first: parts of another job must never be taken for this one's
        self._empty()
        self._parts.mkdir()
        _write_json(file, wanted)

    def _placed(self) -> dict[str, Any] | None:
        """Return the identity of the job whose result is in its place, if there is one."""
        result = _read_json(self.folder / "result.json")
        manifest = self.out / FILE_NAME
        if result is None or not manifest.is_file() or sha256_file(manifest) != result["manifest_sha256"]:
            return None
        identity: dict[str, Any] = result["job"]
        return identity

    def release(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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
        if part not in self._checked:
            if not weights.is_file() or sha256_file(weights) != entry["sha256"]:
                raise OutputError(f"{weights} is not what was written there; begin anew with --restart.")
            self._checked.add(part)
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
            _write_json(self._parts / f"{part}.json", entry)
            self._checked.add(part)
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
        artefact, replaced = self.folder / "artefact", self.folder / "replaced"
        try:
            _remove(artefact)
            artefact.mkdir()
            files = self._gather_weights(artefact, parts)
            write_descriptions(artefact, manifest.model_copy(update={"weights": files}), config, source)
            open_checkpoint(artefact)
            for path in artefact.iterdir():
                path.chmod(0o666 & ~_umask())
                _sync(path)
            _sync(artefact)
            job = _read_json(self.folder / "job.json")
            _write_json(self.folder / "result.json", {"manifest_sha256": sha256_file(artefact / FILE_NAME), "job": job})
            if self.out.exists():
                _remove(replaced)
                self.out.rename(replaced)
            artefact.rename(self.out)
            _sync(self.out.parent)
        except OSError as error:
            shutil.rmtree(artefact, ignore_errors=True)  # it may be what fills the disk
            raise self._failed("the result", error) from error
        return self.clear_up()

    def clear_up(self) -> Checkpoint:
        """Remove the folder of a job whose result is in its place; return the result, opened."""
        with suppress(OSError):  # the result is there, whatever may be left
            self._empty()
            self.folder.rmdir()
        self.release()
        return open_checkpoint(self.out)

    def _empty(self) -> None:
        """Remove what is in the folder; last what says that the result is in its place, so that a kill changes nothing."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "result.json"):
            _remove(path)

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
            _link(self._weights(part), artefact / name)
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
    different = differences(found, wanted)
    if different:
        raise UsageError(
            f"{folder} holds an unfinished job that differs: {'; '.join(different)}. Run that one again to finish it, choose "
            "another --out, or throw it away with --restart."
        )


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Say what differs, by the names of the innermost values: 'options.group_size was 128, is 64'."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        inside = name and f"{name}."
        return [what for key in {**found, **wanted} for what in differences(found.get(key), wanted.get(key), f"{inside}{key}")]
    return [] if found == wanted else [f"{name} was {_short(found)}, is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds what no job made: rubbish of a job is removed, and that would be too."""
    own = {"job.json", "parts", "factors", "artefact", "result.json", "replaced"}
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, and the place of unfinished work; choose another --out.")
    foreign = [p.name for p in folder.iterdir() if p.name.removesuffix(".tmp") not in own] if folder.is_dir() else []
    if foreign:
        raise OutputError(f"{folder} holds {foreign[0]}, which llmq did not put there; move it away, or choose another --out.")


def _link(path: Path, other: Path) -> None:
    """Give the same bytes a second name, so that a part stays finished until the whole result is in its place."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(path, other)  # not every file system has hard links


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """See to it that a file, or the names in a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # the only way to ask is to set it
    os.umask(mask)
    return mask
