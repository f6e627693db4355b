"""`llmq quantize` as processes of their own, which tests may kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shortening import LAYERS

REPO = Path(__file__).parent.parent.parent
SAMPLE = REPO / "llmq" / "assets" / "sample"
WINDOWS = ("--calibration", SAMPLE / "calibration.txt", "--eval-text", SAMPLE / "evaluation.txt")
GPTQ = ("-s", "int4-gptq", *WINDOWS, "--calibration-windows", 8, "--calibration-length", 64, "--threads", 1, "-S", "sweeps=0")
"""A calibrated quantization that takes two seconds of a `shortened` model."""
PARTS = LAYERS + 2


def environment(**more: str) -> dict[str, str]:
    """What `python -m llmq` needs to run on one core, from this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "250", **more}


def start(*arguments: object, **named: object) -> subprocess.Popen[str]:
    """Start `llmq` in a process group of its own."""
    command = [sys.executable, "-m", "llmq", *(str(argument) for argument in arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, env=environment(), text=True, stdout=pipe, stderr=pipe, process_group=0, **named
    )


def finish(process: subprocess.Popen[str], *, code: int = 0, seconds: float = 300) -> str:
    """Wait for a process; it must end with `code` and without a traceback. Returns what it wrote to stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, f"exit {process.returncode}: {out}\n{err}"
    assert "Traceback" not in err
    return err


def stop_when(process: subprocess.Popen[str], ready: Callable[[], bool], with_signal: int = signal.SIGKILL) -> bool:
    """Send a signal as soon as `ready`; returns False where the process ended before."""
    while process.poll() is None:
        if ready():
            process.send_signal(with_signal)
            return True
        time.sleep(0.002)
    return False


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished_parts(out: Path) -> int:
    """How many parts of an unfinished job are finished."""
    return len(list((out.with_name(f"{out.name}.partial") / "parts").glob("*.json")))
