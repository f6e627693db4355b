"""A quantization that is killed, interrupted or out of disk goes on where it stopped, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runs import run_llmq
from jobs import GPTQ, PARTS, content, finish, finished_parts, start, stop_when

from llmq.calibration import activations as activations_module

KILLS = int(os.environ.get("LLMQ_TEST_KILLS", "1"))
"""How many random moments are tried; more for a release."""


@pytest.fixture(scope="module")
def undisturbed(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_llmq("quantize", short_model, *GPTQ, "-o", out)
    assert not out.with_name("out.partial").exists()
    return content(out)


def _stop_after(short_model: Path, out: Path, parts: int, with_signal: int = signal.SIGKILL) -> subprocess.Popen[str]:
    process = start("quantize", short_model, *GPTQ, "-o", out)
    assert stop_when(process, lambda: finished_parts(out) >= parts, with_signal)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3, PARTS])
def test_a_run_killed_after_some_part_goes_on_there(
    short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, parts: int
) -> None:
    out = tmp_path / "out"
    finish(_stop_after(short_model, out, parts), code=-signal.SIGKILL)
    folder = tmp_path / "out.partial" / "parts"
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert parts <= len(finished) <= PARTS
    assert not out.exists()
    kept = dict.fromkeys(finished, 0)
    shutil.copytree(folder, tmp_path / "before")
    result = run_llmq("quantize", short_model, *GPTQ, "-o", out)
    assert f"going on after {len(finished)} of {PARTS} parts" in result.output
    assert content(out) == undisturbed
    assert kept.keys() == {path.name for path in (tmp_path / "before").glob("*.json")}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "before"}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bytes(
    short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    moment = random.Random(number)
    after, more = moment.randrange(PARTS + 1), moment.uniform(0, 2)  # that many parts, and as many seconds
    reached: list[float] = []

    def due() -> bool:
        if not reached and finished_parts(out) >= after:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() >= reached[0] + more

    process = start("quantize", short_model, *GPTQ, "-o", out)
    killed = stop_when(process, due)
    finish(process, code=-signal.SIGKILL if killed else 0)
    parts = finished_parts(out)
    print(f"killed: {killed}; {parts} parts were finished; the result was {'there' if out.exists() else 'not there'}")
    if not out.exists() or out.with_name("out.partial").exists():
        run_llmq("quantize", short_model, *GPTQ, "-o", out)
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = finish(_stop_after(short_model, out, 2, signal.SIGINT), code=130)
    parts = finished_parts(out)
    sentence = said[said.index("error:") :].strip()
    assert f"{parts} parts are finished in {out}.partial: the same command goes on from there, --restart begins anew." in sentence
    assert "\n" not in sentence
    assert f"after {parts} of {PARTS}" in run_llmq("quantize", short_model, *GPTQ, "-o", out).output
    assert content(out) == undisturbed


@contextmanager
def _small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [3, 7])
def test_a_full_disk_ends_with_one_sentence_and_more_room_lets_it_go_on(
    short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, megabytes: int
) -> None:
    with _small_disk(tmp_path / "disk", megabytes << 20) as disk:  # all parts take 5.3 MB, and the result as much again
        out = disk / "out"
        failed = run_llmq("quantize", short_model, *GPTQ, "-o", out, code=6)
        parts = finished_parts(out)
        assert 1 < parts < PARTS if megabytes == 3 else parts == PARTS
        sentence = failed.output[failed.output.index("error:") :].strip()
        assert "No space left on device" in sentence
        assert f"it goes on after the {parts} parts in" in sentence
        assert "\n" not in sentence
        assert not out.exists()
        subprocess.run(["mount", "-o", f"remount,size={64 << 20}", str(disk)], check=True)
        assert f"going on after {parts} of" in run_llmq("quantize", short_model, *GPTQ, "-o", out).output
        assert content(out) == undisturbed


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_with_one_sentence_too(
    short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    largest = 5 << 19  # a part fits, the whole result does not

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    said = finish(start("quantize", short_model, *GPTQ, "-o", out, preexec_fn=limit), code=6)
    sentence = said[said.index("error:") :].strip()
    assert f"cannot write the result to {out}.partial: File too large" in sentence
    assert "\n" not in sentence
    run_llmq("quantize", short_model, *GPTQ, "-o", out)
    assert content(out) == undisturbed


@pytest.fixture
def unfinished(short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that was stopped after some parts, in this process: `OUT`."""
    out = tmp_path / "out"
    _interrupt_after(monkeypatch, 3)
    run_llmq("quantize", short_model, *GPTQ, "-o", out, code=130)
    monkeypatch.undo()
    assert finished_parts(out) == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    return out


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    from llmq.checkpoint.job import Job

    store = Job.store

    def stored(job: Job, *arguments: object) -> None:
        if len(job.finished) == parts:
            raise KeyboardInterrupt
        store(job, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Job, "store", stored)


@pytest.mark.slow
def test_another_job_is_refused_with_the_difference_and_restart_begins_anew(
    short_model: Path, unfinished: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("quantize", short_model, *GPTQ, "-o", unfinished)
    text = tmp_path / "text.txt"
    text.write_text(Path(GPTQ[3]).read_text()[:-20000])
    other = tmp_path / "other"
    shutil.copytree(short_model, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    for arguments, difference in (
        (("quantize", other, *GPTQ, "-o", unfinished), "model was"),
        ((*run[:4], "--calibration", text, *run[6:]), "calibration."),
        ((*run, "-S", "group_size=64"), "options.group_size was 128, is 64"),
        ((*run, "--seed", 1), "seed was 0, is 1"),
        ((*run, "--lm-head"), "skip was"),
        ((*run, "--activations", "fp32"), 'activations was "bf16", is "fp32"'),
        ((*run, "--override", "*.v_proj=int8-weight-only"), "overrides was []"),
    ):
        refused = run_llmq(*arguments, code=2)
        assert difference in refused.output, refused.output
        assert "--restart" in refused.output
        assert finished_parts(unfinished) == 3
    with monkeypatch.context() as patch:
        patch.setattr("llmq.api.quantizing.__version__", "9.9")
        assert 'is "9.9"' in run_llmq(*run, code=2).output
    changed = run_llmq(*run, "--seed", 1, "--restart")
    assert "going on" not in changed.output
    assert json.loads((unfinished / "llmq.json").read_text())["seed"] == 1
    assert content(unfinished) != undisturbed
    run_llmq(*run, "--force")
    assert content(unfinished) == undisturbed


@pytest.mark.slow
def test_force_keeps_the_old_output_until_the_new_one_is_finished(
    short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4)
        run_llmq("quantize", short_model, *GPTQ, "-o", out, "--force", code=130)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert finished_parts(out) == 4
    assert "--force" in run_llmq("quantize", short_model, *GPTQ, "-o", out, code=6).output
    assert [path.name for path in out.iterdir()] == ["precious"]
    run_llmq("quantize", short_model, *GPTQ, "-o", out, "--force")
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_spilled_activations_give_the_same_bytes_and_leave_nothing(
    short_model: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled: list[Path] = []
    on_disk = activations_module._on_disk

    def seen(shape: tuple[int, int, int], dtype: object, folder: Path) -> object:
        spilled.append(folder)
        return on_disk(shape, dtype, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(activations_module, "_on_disk", seen)
    run_llmq("quantize", short_model, *GPTQ, "-o", tmp_path / "out", "--spill", tmp_path / "spill")
    assert spilled
    assert set(spilled) == {tmp_path / "spill"}
    assert list((tmp_path / "spill").iterdir()) == []
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_spilling_to_a_full_disk_is_said(short_model: Path, tmp_path: Path) -> None:
    with _small_disk(tmp_path / "disk", 64 << 10) as disk:
        failed = run_llmq("quantize", short_model, *GPTQ, "-o", tmp_path / "out", "--spill", disk, code=6)
    assert "cannot spill 262,144 bytes of activations" in failed.output
    assert "No space left on device; name a folder on a disk with more room." in failed.output


@pytest.mark.slow
def test_strict_ends_at_a_fallback_and_keeps_what_was_finished(
    short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from llmq.schemes.base import ResolvedScheme

    quantize = ResolvedScheme.quantize_weight

    def fails(scheme: ResolvedScheme, weight: object, statistics: object, fqn: str) -> object:
        quantized, report = quantize(scheme, weight, statistics, fqn)  # type: ignore[arg-type]
        late = fqn == "model.layers.1.mlp.up_proj"
        return quantized, replace(report, fallback="the Hessian could not be factorized") if late else report

    monkeypatch.setattr(ResolvedScheme, "quantize_weight", fails)
    out = tmp_path / "out"
    failed = run_llmq("quantize", short_model, *GPTQ, "-o", out, "--strict", code=4)
    assert "--strict: model.layers.1.mlp.up_proj: the Hessian could not be factorized" in failed.output
    assert finished_parts(out) == 2  # the embedding and a block
    assert not out.exists()
    assert f"going on after 2 of {PARTS}" in run_llmq("quantize", short_model, *GPTQ, "-o", out, "--strict", code=4).output
    went_on = run_llmq("quantize", short_model, *GPTQ, "-o", out)
    assert "model.layers.1.mlp.up_proj was rounded to nearest: the Hessian could not be factorized" in went_on.output
    layers = json.loads((out / "llmq.json").read_text())["layers"]
    assert [layer["fqn"] for layer in layers if layer["fallback"]] == ["model.layers.1.mlp.up_proj"]


@pytest.mark.slow
def test_strict_refuses_calibration_on_the_evaluation_text(short_model: Path, tmp_path: Path) -> None:
    text = GPTQ[3]
    arguments = ("quantize", short_model, *GPTQ, "--eval-text", text, "-o", tmp_path / "out")
    failed = run_llmq(*arguments, "--strict", code=3)
    assert "--strict" in failed.output
    assert "calibrate on another text" in failed.output
    assert list(tmp_path.iterdir()) == []
    assert "calibrate on another text" in run_llmq(*arguments).output
    assert (tmp_path / "out").is_dir()
