"""A job's folder: what is finished stays finished, whatever happens, and never becomes another job's."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoint_writers import Writer
from torch import Tensor

from llmq.checkpoint import Manifest, open_checkpoint
from llmq.checkpoint import job as job_module
from llmq.checkpoint.job import Job
from llmq.checkpoint.source import Checkpoint
from llmq.errors import OutputError, UsageError

IDENTITY = {"model": "abc", "options": {"bits": 4}, "seed": 0}


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    names = list(checkpoint.tensors)
    return {
        "embedding": {name: checkpoint.read(name) for name in names if "embed" in name},
        "rest": {name: checkpoint.read(name) for name in names if "embed" not in name},
    }


def _manifest() -> Manifest:
    return Manifest(scheme="fp32", options={}, source={}, dtype="float32", formats={})


@pytest.fixture
def source(writer: Writer) -> Checkpoint:
    return open_checkpoint(writer.hf())


def _run(out: Path, source: Checkpoint, *, force: bool = False, restart: bool = False, stop: str | None = None) -> list[str]:
    """Do what is left of a job, up to the part `stop`; returns the parts that were made."""
    job = Job(out, IDENTITY, force=force, restart=restart)
    made = []
    try:
        if job.placed:
            job.clear_up()
            return []
        for part, tensors in _parts(source).items():
            if part == stop:
                return made
            if job.entry(part) is None:
                job.store(part, tensors, {"formats": {}})
                made.append(part)
        job.put_together(["embedding", "rest"], _manifest(), source.config, source)
    finally:
        job.release()
    return made


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_job_goes_on_after_what_is_finished_and_ends_with_the_same_bytes(tmp_path: Path, source: Checkpoint) -> None:
    assert _run(tmp_path / "whole", source) == ["embedding", "rest"]
    assert _run(tmp_path / "cut", source, stop="rest") == ["embedding"]
    assert not (tmp_path / "cut").exists()
    assert _run(tmp_path / "cut", source) == ["rest"]
    assert _content(tmp_path / "cut") == _content(tmp_path / "whole")
    written = open_checkpoint(tmp_path / "cut")
    assert all(torch.equal(written.read(name), source.read(name)) for name in source.tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut", "hf"}


def test_many_parts_keep_a_file_each(tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ONE_FILE_BYTES", 0)
    _run(tmp_path / "out", source)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").iterdir())
    monkeypatch.setattr(os, "link", _no_links)  # as on a disk without them
    _run(tmp_path / "copied", source)
    assert _content(tmp_path / "copied") == _content(tmp_path / "out")


def _no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


class _Killed(BaseException):
    """Stands for kill -9: no code of ours catches it, and what is on the disk is all that is left."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[int]:
    """Stop before the `call`-th change of a name in the file system; returns the count of changes so far."""
    count = [0]

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            count[0] += 1
            if count[0] == call:
                raise _Killed
            return change(*arguments, **named)

        return wrapped

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (Path, "rmdir")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return count


@pytest.mark.parametrize("old", [None, "old"])
def test_a_stop_before_any_change_of_the_disk_loses_nothing(
    tmp_path: Path, source: Checkpoint, old: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path / "whole", source)
    wanted = _content(tmp_path / "whole")
    call, reached = 1, True
    while reached:
        out = tmp_path / f"out{call}"
        if old is not None:
            out.mkdir()
            (out / "precious").write_text(old)
        with monkeypatch.context() as patch:
            count = _kill_at(patch, call)
            with suppress(_Killed):
                _run(out, source, force=old is not None)
            reached = count[0] >= call
        aside = out.with_name(f"{out.name}.partial") / "replaced" / "precious"
        if old is not None and not (out.exists() and _content(out) == wanted):
            assert (out / "precious").exists() or aside.exists(), call  # the old one is kept until the new one is there
        folder = out.with_name(f"{out.name}.partial")
        if not (out.exists() and _content(out) == wanted and not (folder.exists() and any(folder.iterdir()))):
            _run(out, source, force=old is not None)
            assert not folder.exists(), call
        assert _content(out) == wanted, call
        call += 1
    assert call > 8  # job.json, two files for each of two parts, result.json, the result, and the clearing up


def test_parts_of_another_job_are_never_used(tmp_path: Path, source: Checkpoint) -> None:
    _run(tmp_path / "out", source, stop="rest")
    other = {**IDENTITY, "options": {"bits": 8}, "seed": 1}
    with pytest.raises(UsageError, match=r"options\.bits was 4, is 8; seed was 0, is 1.*--restart"):
        Job(tmp_path / "out", other, force=False)
    job = Job(tmp_path / "out", other, force=False, restart=True)
    assert job.finished == []
    job.release()
    (tmp_path / "out.partial" / "job.json").unlink()  # as a kill in the middle of a restart leaves it
    (tmp_path / "out.partial" / "parts" / "embedding.json").write_text("{}")
    job = Job(tmp_path / "out", IDENTITY, force=False)
    assert job.finished == []
    job.release()


def test_a_key_that_only_one_of_two_jobs_has_is_named(tmp_path: Path, source: Checkpoint) -> None:
    _run(tmp_path / "out", source, stop="rest")
    with pytest.raises(UsageError, match='activations was null, is "bf16"'):
        Job(tmp_path / "out", {**IDENTITY, "activations": "bf16"}, force=False)


def test_a_damaged_part_is_named(tmp_path: Path, source: Checkpoint) -> None:
    _run(tmp_path / "out", source, stop="rest")
    part = tmp_path / "out.partial" / "parts" / "embedding.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(OutputError, match=r"embedding\.safetensors is not what was written there; begin anew with --restart"):
        _run(tmp_path / "out", source)
    assert _run(tmp_path / "out", source, restart=True) == ["embedding", "rest"]


def test_an_existing_output_and_a_foreign_folder_are_left_alone(tmp_path: Path, source: Checkpoint) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="--force"):
        Job(out, IDENTITY, force=False)
    assert not (tmp_path / "out.partial").exists()
    partial = tmp_path / "mine.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex, which llmq did not put there"):
        Job(tmp_path / "mine", IDENTITY, force=False, restart=True)
    assert (partial / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file.partial").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        Job(tmp_path / "file", IDENTITY, force=False)


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    first = Job(tmp_path / "out", IDENTITY, force=False)
    with pytest.raises(OutputError, match="another process is at work"):
        Job(tmp_path / "out", IDENTITY, force=False)
    first.release()
    Job(tmp_path / "out", IDENTITY, force=False).release()


def test_a_finished_part_reads_back_as_it_was_stored(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.uint8).view(2, 3), "b": torch.tensor([1.5, -0.0], dtype=torch.bfloat16)}
    job = Job(tmp_path / "out", IDENTITY, force=False)
    assert job.entry("p") is None
    job.store("p", tensors, {"formats": {"a": 1}, "text": "ä"})
    entry = job.entry("p")
    job.release()
    assert entry is not None
    assert (entry["formats"], entry["text"]) == ({"a": 1}, "ä")
    read = job.tensors("p")
    assert all(torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items())


LIMITED = """
import json, sys
from pathlib import Path
import torch
from llmq.checkpoint.job import Job
from llmq.errors import LlmqError

job = Job(Path(sys.argv[1]), {"a": 1}, force=False)
try:
    for part in range(8):
        if job.entry(f"part{part}") is None:
            job.store(f"part{part}", {"w": torch.full((part + 1, 1 << 16), part, dtype=torch.float32)}, {})
except LlmqError as error:
    print(json.dumps([error.exit_code, str(error), job.finished]))
"""


@pytest.mark.slow
def test_what_does_not_fit_on_the_disk_ends_with_one_sentence_and_goes_on_later(tmp_path: Path) -> None:
    def run(nbytes: int) -> str:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))

        command = [sys.executable, "-c", LIMITED, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, preexec_fn=limit)
        assert not done.stderr, done.stderr
        return done.stdout

    code, sentence, finished = json.loads(run(1_100_000))  # parts of 256 KiB more each: the fifth does not fit
    assert code == 6
    assert finished == ["part0", "part1", "part2", "part3"]
    assert "cannot write part4.safetensors" in sentence
    assert "it goes on after the 4 parts in" in sentence
    parts = tmp_path / "out.partial" / "parts"
    assert sorted(path.suffix for path in parts.iterdir()) == [".json"] * 4 + [".safetensors"] * 4  # no half-written file
    times = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert run(resource.RLIM_INFINITY) == ""
    assert len(list(parts.glob("*.json"))) == 8
    assert all((parts / name).stat().st_mtime_ns == time for name, time in times.items())
