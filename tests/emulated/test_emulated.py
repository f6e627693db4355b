"""Quantizing on a GPU, proven without one: the checks beside this file run on an emulated device, in a process of their own.

Torch can be told of one such device in a process, and not be made to forget it: what else is tested there would see it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPO = HERE.parent.parent


@pytest.mark.slow
def test_everything_on_an_emulated_device() -> None:
    path = os.pathsep.join([str(REPO), str(REPO / "scripts")])
    checks = [str(HERE / name) for name in ("checks_in_memory.py", "checks_of_jobs.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " failed" not in done.stdout
