"""Time int4-gptq against GPTQModel: one checkpoint, one calibration set, the tools by turns in one run.

    python scripts/race_gptq.py --models DIR --env-dir DIR --setup
    python scripts/measure_scale.py --report

The checkpoint (1.1 B widths, two blocks) is random and written into DIR when it is not there; the time does not depend on the
numbers. The records go to configs/scale, and docs/scale.md says what the figures mean.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from peers.environments import Environments
from scale.catalogue import Case
from scale.page import RACE
from scale.race import CONTENDERS, Race
from scale.running import Runner

from llmq.calibration.corpus import resolve_text
from llmq.calibration.recorder import InputRecorder
from llmq.checkpoint import load_tokenizer_for, open_checkpoint
from llmq.errors import LlmqError
from llmq.files import atomic_path
from llmq.results.environment import available_cores
from llmq.results.store import append_records

REPO = Path(__file__).resolve().parent.parent
ASSETS = REPO / "llmq" / "assets"


def say(text: str) -> None:
    """Tell what happens."""
    print(text, file=sys.stderr, flush=True)


def main(  # noqa: PLR0913, PLR0917 - one for each option
    models: Annotated[Path, typer.Option("--models", help="Folder of the checkpoint.")],
    env_dir: Annotated[Path, typer.Option("--env-dir", help="Folder of GPTQModel's environment.")],
    setup: Annotated[bool, typer.Option("--setup", help="Make the environment if it is not there.")] = False,
    shape: Annotated[str, typer.Option("--shape", help="Widths, see scripts/scale/catalogue.py.")] = "1.1B",
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Blocks of the checkpoint.")] = 2,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens of a window.")] = 256,
    text: Annotated[Path, typer.Option("--text", help="Calibration text.")] = ASSETS / "sample" / "calibration.txt",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each tool runs.")] = 3,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every tool.")] = available_cores(),
    output: Annotated[Path, typer.Option("--output", help="File of the records.")] = REPO / RACE,
) -> None:
    """Let llmq and GPTQModel quantize by turns, and keep a record of each."""
    try:
        environments = Environments(env_dir.resolve())
        for name in dict.fromkeys(each.environment for each in CONTENDERS if setup):
            environments.set_up(name, say)
        runner = Runner(models.resolve(), ASSETS / "wt2-8m", text, threads, timed=False)
        checkpoint = runner.checkpoint(Case(shape, blocks, "int4-gptq", windows, length))
        tokenizer = load_tokenizer_for(open_checkpoint(str(checkpoint)))
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / "windows.safetensors"
            InputRecorder(tokenizer, windows=windows, length=length, seed=0).record_text(resolve_text(text, split="train")).save(
                drawn
            )
            records = Race(environments, checkpoint, drawn, (windows, length), threads, rounds, say).run()
        with atomic_path(output, force=True) as temporary:
            append_records(temporary, records)
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
