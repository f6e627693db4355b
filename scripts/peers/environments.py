"""A Python environment for each peer, made from the package registry with the versions of configs/peers/*.txt.

A requirements file has one paragraph a step, separated by empty lines: torch comes first and alone where it is needed, so that
a build for the CPU is found and kept. Lines that begin with `#env NAME=VALUE` set the environment of the build.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import InputError

REQUIREMENTS = Path(__file__).resolve().parent.parent.parent / "configs" / "peers"
STAMP = "llmq-peer.sha256"


@dataclass(frozen=True, slots=True)
class Environments:
    """The folder that holds one environment a peer."""

    folder: Path

    def python(self, name: str) -> Path:
        """Return the interpreter of a peer's environment; llmq's own is the one that runs."""
        if name == "llmq":
            return Path(sys.executable)
        return self.folder / name / "bin" / "python"

    def obstacle(self, name: str) -> str | None:
        """Return why an environment cannot be used; None when it can."""
        if name == "llmq":
            return None
        stamp = self.folder / name / STAMP
        if not stamp.is_file():
            return f"its environment {self.folder / name} is not set up; run again with --setup"
        if stamp.read_text().strip() != digest(name):
            return f"its environment {self.folder / name} has other versions than {requirements(name).name}; run with --setup"
        return None

    def set_up(self, name: str, say: Callable[[str], None]) -> None:
        """Make an environment, unless it is there with the pinned versions.

        Raises:
            InputError: the packages cannot be installed; the message ends with the installer's last words.
        """
        if self.obstacle(name) is None:
            return
        say(f"setting up {name} from {requirements(name).name}")
        place = self.folder / name
        build, steps = read_steps(requirements(name))
        self._run(name, [sys.executable, "-m", "venv", "--clear", str(place)], {})
        for step in steps:
            self._run(name, [str(self.python(name)), "-m", "pip", "install", "--quiet", *step], build)
        (place / STAMP).write_text(digest(name) + "\n")

    def _run(self, name: str, command: list[str], build: dict[str, str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **build})
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise InputError(f"the environment {name} cannot be set up: {words[-1].strip()}; mend {requirements(name)}.")


def requirements(name: str) -> Path:
    """Return the file of a peer's pinned versions."""
    return REQUIREMENTS / f"{name}.txt"


def digest(name: str) -> str:
    """Return the hash of what an environment is made of."""
    return hashlib.sha256(requirements(name).read_bytes()).hexdigest()


def read_steps(path: Path) -> tuple[dict[str, str], list[list[str]]]:
    """Return the build's environment, and the packages of each step."""
    build: dict[str, str] = {}
    steps: list[list[str]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#env "):
            name, _, value = text.removeprefix("#env ").partition("=")
            build[name] = value
        elif not text:
            steps.append([])
        elif not text.startswith("#"):
            steps[-1] += text.split()
    return build, [step for step in steps if step]
