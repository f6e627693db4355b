"""Times are measured once a machine, kept for every process, and never a reason to fail."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from op_cases import FORMATS, case_of

from llmq.ops import choice_file
from llmq.ops.choice_file import KeptTimes, Machine, choices_path, this_machine
from llmq.ops.choices import Times
from llmq.ops.dense import DequantGemm, TorchDense
from llmq.ops.schema import Case, Kernel
from llmq.progress import Silent

KERNELS = (DequantGemm(), TorchDense())
CASE = case_of(FORMATS["int4"], 48, 128, torch.bfloat16)
H200 = Machine(device="NVIDIA H200", driver="560.35.03", torch="2.13.0", triton="3.7.1", llmq="0.1.0", threads=0)


class Counted:
    """A timer that counts its calls."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def __call__(self, case: Case, kernels: Sequence[Kernel]) -> Times:
        self.cases.append(case)
        return {kernel.name: (1e-5 * len(self.cases), 2e-5, 3e-5, 4e-5) for kernel in kernels}


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_case_is_measured_once(tmp_path: Path):
    path, timer, heard = tmp_path / "new" / "times.json", Counted(), Heard()
    first = KeptTimes(path, H200, timer, heard)
    times = first(CASE, KERNELS)
    assert first(CASE, KERNELS) == {name: list(seconds) for name, seconds in times.items()}
    assert KeptTimes(path, H200, timer)(CASE, KERNELS)["dequant-gemm"] == [1e-5, 2e-5, 3e-5, 4e-5]
    assert timer.cases == [CASE]
    others = [case_of(FORMATS["int4"], 48, 256, torch.bfloat16), case_of(FORMATS["int4"], 48, 128, torch.float32)]
    others.append(case_of(FORMATS["int8-weight-only"], 48, 128, torch.bfloat16))
    for case in others:
        first(case, KERNELS)
    assert timer.cases == [CASE, *others]
    assert heard.notes == []


def test_other_kernels_are_measured_anew(tmp_path: Path):
    path, timer = tmp_path / "times.json", Counted()
    KeptTimes(path, H200, timer)(CASE, KERNELS)
    assert set(KeptTimes(path, H200, timer)(CASE, KERNELS[:1])) == {"dequant-gemm"}
    assert len(timer.cases) == 2


@pytest.mark.parametrize("field", Machine.model_fields)
def test_another_machine_measures_anew_and_keeps_the_first(tmp_path: Path, field: str):
    path, timer = tmp_path / "times.json", Counted()
    other = H200.model_copy(update={field: 8 if field == "threads" else "another"})
    for machine in (H200, other, H200, other):
        KeptTimes(path, machine, timer)(CASE, KERNELS)
    assert len(timer.cases) == 2
    written = json.loads(path.read_text())
    assert written["version"] == 1
    assert [each["machine"] for each in written["machines"].values()] == [H200.model_dump(), other.model_dump()]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "(not JSON: Invalid JSON"),
        ("", "(not JSON: Invalid JSON"),
        ('{"version": 2, "machines": {}}', "(version: Input should be 1)"),
        ('{"version": 1, "machines": {"k": {"times": {}}}}', "(machines.k.machine: Field required)"),
        (None, "Input should be greater than 0"),
    ],
)
def test_a_damaged_file_is_said_and_made_anew(tmp_path: Path, text: str | None, reason: str):
    path, timer, heard = tmp_path / "times.json", Counted(), Heard()
    KeptTimes(path, H200, timer)(CASE, KERNELS)
    path.write_text(path.read_text().replace("0.00002", "-1").replace("2e-05", "-1") if text is None else text)
    again = KeptTimes(path, H200, timer, heard)
    again(CASE, KERNELS)
    again(CASE, KERNELS)
    assert len(timer.cases) == 2
    (note,) = heard.notes
    assert note.startswith(f"{path} is damaged or of another version")
    assert reason in note
    assert KeptTimes(path, H200, timer)(CASE, KERNELS)
    assert len(timer.cases) == 2


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    timer, heard = Counted(), Heard()
    times = KeptTimes(tmp_path / "file" / "times.json", H200, timer, heard)
    assert set(times(CASE, KERNELS)) == {"dequant-gemm", "torch-dense"}
    times(CASE, KERNELS)
    assert len(timer.cases) == 2
    (note,) = heard.notes  # once
    assert note.endswith("(Not a directory); kernels are measured anew.")


def test_a_full_disk_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    heard, path = Heard(), tmp_path / "times.json"
    monkeypatch.setattr(Path, "write_text", full)
    KeptTimes(path, H200, Counted(), heard)(CASE, KERNELS)
    (note,) = heard.notes
    assert note.startswith(f"the times of kernels cannot be kept in {path} (")
    assert "No space left" in note
    assert [each.name for each in tmp_path.iterdir()] == [".times.json.lock"]


def _write(path: Path, start: int) -> None:
    for k in range(start, start + 20):
        KeptTimes(path, H200, Counted())(case_of(FORMATS["int4"], 48, 32 * k, torch.bfloat16), KERNELS)


def test_two_processes_lose_nothing(tmp_path: Path):
    path, context = tmp_path / "times.json", multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, start)) for start in (1, 101)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    (machine,) = json.loads(path.read_text())["machines"].values()
    assert len(machine["times"]) == 40


def test_the_file_is_in_the_folder_for_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert choices_path() == Path("/somewhere/llmq/kernel-choices.json")


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    here = this_machine("cpu")
    assert here == this_machine("cpu")
    assert (here.torch, here.threads) == (torch.__version__, 1)

    class Properties:
        name, multi_processor_count, total_memory = "NVIDIA H200", 132, 143771 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\n")
    monkeypatch.setattr(choice_file, "_NVIDIA", version)
    gpu = this_machine("cuda")
    assert (gpu.device, gpu.driver) == ("NVIDIA H200, 132 SMs, 143771 MiB", "560.35.03")
    assert gpu.key != here.key
    monkeypatch.setattr(choice_file, "_NVIDIA", tmp_path / "absent")
    assert this_machine("cuda").driver == "unknown"
