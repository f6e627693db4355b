"""int4-gptq and GPTQModel on one checkpoint with one calibration set, by turns, each in a process and environment of its own.

The time is that of quantizing alone, as each maker measures it: imports, and GPTQModel's loading, are left out; llmq reads the
checkpoint and writes the result within it. GPTQModel runs in the checkpoint's own dtype, as it would choose.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.environments import Environments
from quality.exchange import MADE, Made, Order
from quality.making import last_words

from llmq.errors import InputError
from llmq.files import sha256_files
from llmq.results.environment import capture
from llmq.results.record import Metric, Protocol, ResultRecord, Subject

SCRIPTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Contender:
    """Who quantizes: whose environment, by which maker, with which settings."""

    name: str
    environment: str
    maker: str
    settings: dict[str, Any] = field(default_factory=dict)


_GPTQ = {"bits": 4, "group_size": 128, "sym": False}
CONTENDERS = (
    Contender("llmq int4-gptq", "llmq", "llmq_maker", {"scheme": "int4-gptq", "set": {}, "words": []}),
    Contender("GPTQModel, bf16", "gptqmodel", "gptqmodel_maker", {**_GPTQ, "dtype": "bfloat16"}),
)


@dataclass(frozen=True, slots=True)
class Race:
    """What all of them get.

    Attributes:
        environments: of the tools.
        checkpoint: the original, in Hugging Face layout.
        windows: calibration windows, as `llmq calibrate` writes them.
        shape: of these, for the record: windows and tokens a window.
        threads: of every tool.
        rounds: how often each runs.
        say: told what happens.
    """

    environments: Environments
    checkpoint: Path
    windows: Path
    shape: tuple[int, int]
    threads: int
    rounds: int
    say: Callable[[str], None]

    def run(self) -> list[ResultRecord]:
        """Let all run by turns; return a record each, with its times in the order of the rounds.

        Raises:
            InputError: a tool is not set up, or fails; with its last words.
        """
        obstacles = [obstacle for each in CONTENDERS if (obstacle := self.environments.obstacle(each.environment))]
        if obstacles:
            raise InputError(obstacles[0])
        made: dict[str, list[Made]] = {each.name: [] for each in CONTENDERS}
        for turn in range(self.rounds):
            for each in CONTENDERS:
                made[each.name].append(self._make(each))
                self.say(f"{each.name}, turn {turn + 1}: {made[each.name][-1].cost.seconds:.1f} s")
        ours = made[CONTENDERS[0].name]
        return [self._record(each, made[each.name], ours) for each in CONTENDERS]

    def _make(self, contender: Contender) -> Made:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            Order(str(self.checkpoint), str(self.windows), place, self.threads, contender.settings).write(folder / "order.json")
            words = [str(self.environments.python(contender.environment)), "-m", f"quality.{contender.maker}"]
            paths = [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(self.threads)}
            # in the folder, because GPTQModel writes a log to where it is
            done = subprocess.run(
                [*words, str(folder / "order.json")], capture_output=True, text=True, check=False, env=environment, cwd=place
            )
            if done.returncode or not (folder / MADE).is_file():
                raise InputError(f"{contender.name} failed: {last_words(done.stdout + done.stderr)}")
            return Made.read(folder)

    def _record(self, contender: Contender, made: list[Made], ours: list[Made]) -> ResultRecord:
        seconds = [each.cost.seconds for each in made]
        ratios = [mine.cost.seconds / each.cost.seconds for mine, each in zip(ours, made, strict=True)]
        cpu = [each.cost.cpu_seconds for each in made]
        metrics = {
            "seconds": Metric(value=statistics.median(seconds), unit="s", samples=seconds),
            "cpu_seconds": Metric(value=statistics.median(cpu), unit="s", samples=cpu),
            "llmq_share": Metric(value=statistics.median(ratios), unit="1", samples=ratios),
        }
        windows, length = self.shape
        return ResultRecord(
            kind="quantize",
            subject=Subject(
                model=self.checkpoint.name,
                checkpoint_sha256=sha256_files(sorted(self.checkpoint.glob("*.safetensors"))),
                scheme="int4-gptq",
                options={
                    "contender": contender.name,
                    "settings": contender.settings,
                    "versions": made[0].versions,
                    "calibration": {"windows": windows, "length": length},
                },
                bits_per_weight=made[0].bits_per_weight,
            ),
            protocol=Protocol(name="race", version=1, params={"rounds": self.rounds, "threads": self.threads}),
            metrics=metrics,
            environment=capture(self.threads),
        )
