"""The driver's side of the makers: one process a row, in its tool's environment; what was made is kept and used again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers.environments import Environments
from peers.weights import SCRIPTS, remove

from quality.catalogue import Row
from quality.corpus import Corpus
from quality.exchange import MADE, Made, Order


class NotMadeError(Exception):
    """A row has no weights; the message says why."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the weights of rows.

    Attributes:
        environments: of the tools.
        corpus: what the suite calibrates with.
        threads: of every tool.
        say: told what happens.
        again: make anew what is there.
    """

    environments: Environments
    corpus: Corpus
    threads: int
    say: Callable[[str], None]
    again: bool = False

    def make(self, row: Row) -> tuple[Path, Made]:
        """Return the folder with a row's weights, and what its maker says of them.

        Raises:
            NotMadeError: the tool is not set up, does not know the scheme, or fails; with its last words.
        """
        obstacle = self.environments.obstacle(row.environment)
        if obstacle is not None:
            raise NotMadeError(obstacle)
        order = self._order(row)
        key = hashlib.sha256(json.dumps([order.settings, order.windows, self.threads], sort_keys=True).encode()).hexdigest()
        suite = self.corpus.suite
        folder = self.corpus.folder / suite.name / f"{re.sub('[^A-Za-z0-9.]+', '-', row.name)}-{key[:8]}"
        if self.again or not (folder / MADE).is_file():
            self.say(f"{suite.name}: making {row.name}")
            remove(folder)
            folder.mkdir(parents=True)
            self._run(row, Order(**{**vars(order), "out": str(folder)}), folder)
        return folder, Made.read(folder)

    def _order(self, row: Row) -> Order:
        settings = dict(row.settings)
        if row.environment == "llama_cpp":
            settings["imatrix"] = str(self.corpus.imatrix(row.windows))
        if row.is_llmq:
            settings["words"] = [*settings["words"], *self.corpus.suite.extra]
            checkpoint = Path(self.corpus.checkpoint.path).resolve()
        else:
            checkpoint = self.corpus.hugging_face()
        windows = self.corpus.windows(row.windows)
        return Order(str(checkpoint), None if windows is None else str(windows), "", self.threads, settings)

    def _run(self, row: Row, order: Order, folder: Path) -> None:
        order.write(folder / "order.json")
        command = [str(self.environments.python(row.environment)), "-m", f"quality.{row.maker}", str(folder / "order.json")]
        paths = [str(SCRIPTS), *([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")] if row.is_llmq else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(self.threads)}
        with (folder / "log.txt").open("wb") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment, cwd=folder)
        if done.returncode or not (folder / MADE).is_file():
            raise NotMadeError(last_words((folder / "log.txt").read_text(errors="replace")))


def last_words(log: str) -> str:
    """Return the last line of a log that says something, without the frames that rich draws and the name of the exception."""
    lines = [line.strip(" │|\t") for line in log.splitlines() if re.search("[A-Za-z]", line)]
    return re.sub(r"^llmq\.errors\.\w+: ", "", lines[-1]) if lines else "no message"
