"""The driver's end of a worker: start it, ask it, end it."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import psutil

from peers.weights import SCRIPTS

REPO = SCRIPTS.parent


class WorkerError(Exception):
    """A worker cannot go on; the message says why."""


class UnsupportedError(Exception):
    """A worker cannot do what was asked; the message says why."""


class Worker:
    """One engine in a process of its own; loaded when this returns.

    Raises:
        WorkerError: it does not load.
    """

    def __init__(self, command: list[str], *, timeout_s: float = 900.0, environment: dict[str, str] | None = None) -> None:
        self.timeout_s = timeout_s
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        paths = os.pathsep.join(filter(None, [str(SCRIPTS), str(REPO), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
        )
        self.unread = b""
        self.ended = False
        try:
            self.info: dict[str, Any] = self._answer()["info"]
        except WorkerError:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            UnsupportedError: the engine has no way to do it.
            WorkerError: it failed, died, or did not answer in time.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"the worker has ended: {self._last_words()}") from error
        return self._answer()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the worker has used so far."""
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def close(self) -> None:
        """End the worker."""
        if self.ended:
            return
        self.ended = True
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()  # it reads the end of its input, and quits
                except OSError:  # what was not yet sent has nobody to read it any more
                    continue
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._line())
        if "unsupported" in message:
            raise UnsupportedError(message["unsupported"])
        if "error" in message:
            raise WorkerError(message["error"])
        return message

    def _line(self) -> bytes:
        """Read one line, or raise WorkerError after `timeout_s`."""
        assert self.process.stdout is not None
        end = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise WorkerError(f"no answer in {self.timeout_s:.0f} s")
                piece = os.read(self.process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise WorkerError(f"the worker has ended: {self._last_words()}")
                self.unread += piece
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        words = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return (words[-1].strip() if words else "no message") + f" (exit code {self.process.returncode})"


def worker_command(python: Path, worker: str, order: dict[str, Any]) -> list[str]:
    """Return how a worker is started, a module of this package or a file; `order` is what `protocol.Order` reads."""
    options = {**order, "options": json.dumps(order["options"])}
    start = [worker] if worker.endswith(".py") else ["-m", f"peers.{worker}"]
    return [str(python), *start, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
