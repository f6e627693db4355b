"""Where calibration windows come from, and recording them for later runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmq.calibration.corpus import resolve_text, token_stream
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.checkpoint import load_tokenizer_for, open_checkpoint
from llmq.checkpoint.sniff import Kind, sniff
from llmq.errors import UsageError
from llmq.files import check_absent
from llmq.model.config import LlamaConfig
from llmq.model.tokenizer import Tokenizer
from llmq.progress import SILENT, Progress

DEFAULT_WINDOWS = 128
"""Calibration windows where no number is asked for and the text has as many."""
MAX_DEFAULT_WINDOW = 2048
"""Longest window that is chosen without being asked for: the papers' length, and a bound on memory."""


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """Where calibration windows come from: a text, or a file that `llmq calibrate` wrote; None is the default text.

    `windows` None takes `DEFAULT_WINDOWS`, or as many as the text has; `length` None takes `context_window`.
    """

    source: str | None = None
    windows: int | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True)
class CalibrationInput:
    """What to record: one of a text file, a dataset or lm-eval tasks (none of them: the default text)."""

    text: str | None = None
    dataset: str | None = None
    tasks: str | None = None
    column: str = "text"
    windows: int | None = None
    length: int | None = None


def calibration_set(
    tokenizer: Tokenizer, config: LlamaConfig, source: CalibrationSource, *, seed: int, progress: Progress = SILENT
) -> CalibrationSet:
    """Read a recorded calibration set, or record one from a text."""
    if source.source and Path(source.source).is_file() and sniff(Path(source.source)) is Kind.SAFETENSORS:
        return CalibrationSet.load(Path(source.source), tokenizer=tokenizer)
    length = source.length or context_window(config)
    return record_text(tokenizer, source.source, source.windows, length, seed, progress=progress)


def record_text(
    tokenizer: Tokenizer, named: str | None, windows: int | None, length: int, seed: int, *, progress: Progress = SILENT
) -> CalibrationSet:
    """Record windows of a text; says which text, and how many windows where nobody said."""
    text = resolve_text(named, split="train")
    if windows is None:
        available = len(token_stream(tokenizer, text.documents())) // length
        windows = max(1, min(DEFAULT_WINDOWS, available))
    progress.note(f"calibration text: {text.name}, {windows} windows of {length} tokens")
    return InputRecorder(tokenizer, windows=windows, length=length, seed=seed).record_text(text)


def context_window(config: LlamaConfig) -> int:
    """Window length where none is asked for: the model's context, at most `MAX_DEFAULT_WINDOW` tokens."""
    return min(config.max_position_embeddings, MAX_DEFAULT_WINDOW)


def record_calibration(
    path: str, source: CalibrationInput, out: Path, *, seed: int = 0, force: bool = False, progress: Progress = SILENT
) -> CalibrationSet:
    """Record token windows for the tokenizer of a checkpoint and write them to `out`.

    Raises:
        UsageError: more than one source is named.
        TextError: the source cannot be read, or has too few tokens.
        OutputError: `out` exists and `force` is not set.
    """
    check_absent(out, force=force)
    named = [name for name in ("text", "dataset", "tasks") if getattr(source, name)]
    if len(named) > 1:
        raise UsageError(f"name one source of calibration windows, got {' and '.join(f'--{name}' for name in named)}.")
    checkpoint = open_checkpoint(path)
    length = source.length or context_window(checkpoint.config)
    tokenizer = load_tokenizer_for(checkpoint)
    recorder = InputRecorder(tokenizer, windows=source.windows or DEFAULT_WINDOWS, length=length, seed=seed)
    if source.dataset:
        recorded = recorder.record_dataset(source.dataset, column=source.column)
    elif source.tasks:
        recorded = recorder.record_tasks([name.strip() for name in source.tasks.split(",") if name.strip()])
    else:
        recorded = record_text(tokenizer, source.text, source.windows, length, seed, progress=progress)
    recorded.save(out, force=force)
    return recorded
