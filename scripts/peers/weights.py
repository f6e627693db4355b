"""The same weights for every peer: made once from the checkpoint by the peer's own converter, and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import InputError
from peers.catalogue import CHECKPOINT, Variant
from peers.environments import Environments

SCRIPTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class WeightStore:
    """Where the weights of one checkpoint are kept, in a folder that its hash names."""

    environments: Environments
    checkpoint: Path
    sha256: str
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """The folder of this checkpoint's weights."""
        return self.environments.folder / "weights" / f"{self.checkpoint.name}-{self.sha256[:12]}"

    def path(self, variant: Variant) -> Path:
        """Return where a variant's weights are, making them first when they are not there.

        Raises:
            InputError: the converter fails; the message ends with its last words.
        """
        if variant.maker == CHECKPOINT:
            return self.checkpoint
        source = self.checkpoint if variant.source == CHECKPOINT else self.make(variant, variant.source, self.checkpoint)
        return self.make(variant, variant.kind, source)

    def make(self, variant: Variant, kind: str, source: Path) -> Path:
        """Return the weights `kind` of a variant's maker, made from `source` when they are not there."""
        target = self.folder / variant.environment / kind
        if target.exists():
            return target
        self.say(f"making {kind} weights for {variant.environment}")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{kind}.unfinished")
        remove(unfinished)
        python = self.environments.python(variant.environment)
        command = [str(python), "-m", f"peers.{variant.maker}", str(source), str(unfinished), kind]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}
        )
        if done.returncode:
            remove(unfinished)
            words = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise InputError(f"weights {kind} of {variant.environment} cannot be made: {words[-1].strip()}")
        unfinished.rename(target)
        return target


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
