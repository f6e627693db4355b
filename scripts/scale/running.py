"""One case: its checkpoint, the plan, the quantization in a process of its own, and the record of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import InputError
from llmq.files import sha256_files
from llmq.results.environment import capture
from llmq.results.record import Metric, Protocol, ResultRecord, Subject
from scale.catalogue import SHAPES, Case

SCRIPTS = Path(__file__).resolve().parent.parent


PEAK = "largest resident set: "
_WITNESS = f"""
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    # ru_maxrss would begin at the size of the process that this one was forked from
    status = Path("/proc/self/status").read_text()
    sys.stdout.flush()
    print("\\n{PEAK}" + status.split("VmHWM:")[1].split()[0], file=sys.stderr, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a process took: its largest resident set (mapped pages as far as they were in memory), and time."""

    peak_bytes: int
    cpu_seconds: float
    seconds: float
    output: str


def run_measured(module: str, words: list[str], environment: dict[str, str]) -> Spent:
    """Run a Python module as a program of its own on Linux; raises InputError with its last line when it fails."""
    command = [sys.executable, "-c", _WITNESS, module, *words]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        output, _, peak = process.stdout.read().rpartition(f"\n{PEAK}")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (output.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"`{module} {' '.join(words)}` ended with {process.returncode}: {last}")
    return Spent(int(peak) * 1024, usage.ru_utime + usage.ru_stime, time.perf_counter() - started, output)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs cases.

    Attributes:
        models: folder of the checkpoints.
        tokenizer: checkpoint whose tokenizer they get.
        text: calibration text.
        threads: of llmq.
        timed: measure the plan's time too, which quantizes a block.
    """

    models: Path
    tokenizer: Path
    text: Path
    threads: int
    timed: bool

    def checkpoint(self, case: Case) -> Path:
        """Return the case's checkpoint, which is written when it is not there."""
        folder = self.models / case.model
        if not folder.is_dir():
            words = [*SHAPES[case.shape], "--layers", str(case.blocks), "--tokenizer-from", str(self.tokenizer)]
            run_measured("make_random_checkpoint", [str(folder), *words], self._environment())
        return folder

    def measure(self, case: Case) -> ResultRecord:
        """Plan, quantize, and return the record."""
        model = self.checkpoint(case)
        words = [str(model), "-s", case.scheme, "--threads", str(self.threads)]
        words += [word for option in case.options for word in ("-S", option)]
        if case.windows:
            words += ["--calibration", str(self.text), "--calibration-windows", str(case.windows)]
            words += ["--calibration-length", str(case.length)]
        plan = ["plan", *words, "--json", *(["--measure"] if self.timed else [])]
        planned = json.loads(_json_of(run_measured("llmq", plan, self._environment()).output))
        out = self.models / f".{case.model}-{case.scheme}"
        done = run_measured("llmq", ["quantize", *words, "-o", str(out), "--force", "--restart"], self._environment())
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        _remove(out)
        return self._record(case, planned, done, size)

    def _record(self, case: Case, planned: dict[str, Any], done: Spent, size: int) -> ResultRecord:
        metrics = {
            "peak_bytes": Metric(value=done.peak_bytes, unit="bytes"),
            "planned_peak_bytes": Metric(value=planned["peak_bytes"], unit="bytes"),
            "size_bytes": Metric(value=size, unit="bytes"),
            "planned_size_bytes": Metric(value=planned["total_bytes"], unit="bytes"),
            "seconds": Metric(value=done.seconds, unit="s"),
            "cpu_seconds": Metric(value=done.cpu_seconds, unit="s"),
        }
        if planned["seconds"] is not None:
            metrics["planned_seconds"] = Metric(value=planned["seconds"]["total"], unit="s")
        files = sorted((self.models / case.model).glob("*.safetensors"))
        calibration = {"text": self.text.name, "windows": case.windows, "length": case.length} if case.windows else None
        options = {"case": case.name, "calibration": calibration, "planned_parts": planned["peak_parts"]}
        return ResultRecord(
            kind="quantize",
            subject=Subject(model=case.model, checkpoint_sha256=sha256_files(files), scheme=case.scheme, options=options),
            protocol=Protocol(name="scale", version=1, params={"peak": "VmHWM", "threads": self.threads}),
            metrics=metrics,
            environment=capture(self.threads),
        )

    def _environment(self) -> dict[str, str]:
        paths = [str(SCRIPTS.parent), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
        threads = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **threads}


def _json_of(output: str) -> str:
    """Return the JSON of a command that may have written notes before it."""
    return output[output.index("{") : output.rindex("}") + 1]


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
