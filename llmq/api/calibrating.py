"""Where calibration windows come from, recording them for later runs, and whether they hold what is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.calibration.corpus import resolve_text
from llmq.calibration.mixture import parse_sources
from llmq.calibration.overlap import N_WORDS, Overlap, overlap
from llmq.calibration.recorder import DEFAULT_WINDOWS, CalibrationInfo, CalibrationSet, InputRecorder
from llmq.checkpoint import load_tokenizer_for, open_checkpoint
from llmq.checkpoint.sniff import Kind, sniff
from llmq.errors import UsageError
from llmq.files import check_absent
from llmq.model.config import LlamaConfig
from llmq.model.tokenizer import Tokenizer
from llmq.progress import SILENT, Progress

__all__ = [
    "DEFAULT_WINDOWS",
    "CalibrationInput",
    "CalibrationSource",
    "OverlapCheck",
    "calibration_json",
    "calibration_set",
    "check_overlap",
    "context_window",
    "record_calibration",
]

MAX_DEFAULT_WINDOW = 2048
"""Longest window that is chosen without being asked for: the papers' length, and a bound on memory."""


@dataclass(frozen=True, slots=True)
class CalibrationSource:
    """Where calibration windows come from, and which text they must not hold.

    Attributes:
        source: `SOURCE` or `SOURCE=WEIGHT`, or several of them: a text, a file of rows or chats, a folder of either,
            `hf:NAME`, or (alone) a set that `llmq calibrate` wrote; None is the default text.
        windows: how many; None takes `DEFAULT_WINDOWS`, or as many as the sources have.
        length: tokens a window; None takes `context_window`.
        column: of the text in rows.
        chat_template: file with the template of chats; None: the one beside the tokenizer.
        eval_text: what the windows are searched for; None is the text that is evaluated where none is named.
    """

    source: str | tuple[str, ...] | None = None
    windows: int | None = None
    length: int | None = None
    column: str = "text"
    chat_template: str | None = None
    eval_text: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The sources, as a tuple; empty: the default text."""
        if self.source is None:
            return ()
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)


@dataclass(frozen=True, slots=True)
class CalibrationInput:
    """What to record: one of sources, a text file, a dataset or lm-eval tasks (none of them: the default text)."""

    text: str | None = None
    dataset: str | None = None
    tasks: str | None = None
    column: str = "text"
    windows: int | None = None
    length: int | None = None
    sources: tuple[str, ...] = ()
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class OverlapCheck:
    """What a calibration set shares with a text that is evaluated.

    Attributes:
        text: name of the evaluation text.
        text_sha256: of it.
        found: the passages that both have.
    """

    text: str
    text_sha256: str
    found: Overlap

    @property
    def warning(self) -> str | None:
        """One sentence when they share too much, else None."""
        return self.found.warning

    def sentence(self) -> str:
        """Say what was found, whether it is much or not."""
        example = f", such as {self.found.examples[0]!r}" if self.found.examples else ""
        return f"overlap with the evaluation text {self.text}: {self.found.share:.2%} of its passages of {N_WORDS} words{example}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the calibration part of a manifest."""
        return {
            "text": self.text,
            "text_sha256": self.text_sha256,
            "n_words": N_WORDS,
            "shared": self.found.shared,
            "total": self.found.total,
            "share": self.found.share,
            "examples": list(self.found.examples),
        }


def calibration_set(
    tokenizer: Tokenizer, config: LlamaConfig, source: CalibrationSource, *, seed: int, progress: Progress = SILENT
) -> CalibrationSet:
    """Read a recorded calibration set, or record one from its sources.

    Raises:
        TextError: a source cannot be read, or has too little text.
        UsageError: the sources contradict each other, or a recorded set is not alone.
    """
    recorded = [name for name in source.named if Path(name).is_file() and sniff(Path(name)) is Kind.SAFETENSORS]
    if recorded and len(source.named) > 1:
        raise UsageError(f"{recorded[0]} is a recorded calibration set; name it alone, or record all sources into one set.")
    if recorded:
        found = CalibrationSet.load(Path(recorded[0]), tokenizer=tokenizer)
        _check_length(found, source, recorded[0])
        return found
    length = source.length or context_window(config)
    recorder = InputRecorder(tokenizer, source.windows, length, seed, source.chat_template)
    found = recorder.record_sources(parse_sources(source.named), column=source.column)
    for part in found.info.parts:
        progress.note(f"calibration text: {part.name}, {part.windows} windows of {length} tokens")
    return found


def _check_length(found: CalibrationSet, source: CalibrationSource, name: str) -> None:
    """Refuse other windows than a recorded set has."""
    info = found.info
    for option, asked, has in (("windows", source.windows, info.windows), ("length", source.length, info.length)):
        if asked is not None and asked != has:
            raise UsageError(
                f"calibration set {name} has {option} {has}, and --calibration-{option} asks for {asked}; leave it out, or "
                "record another set."
            )


def check_overlap(
    calibration: CalibrationSet, tokenizer: Tokenizer, *, eval_text: str | None = None, progress: Progress = SILENT
) -> OverlapCheck:
    """Search a calibration set for passages of the text that `llmq eval` would use, and say what was found.

    A recorded set is searched as any other: its tokens decode to its text.

    Args:
        calibration: the windows.
        tokenizer: that they were made with.
        eval_text: the evaluation text; None: the default one.
        progress: hears the result as a note.

    Returns:
        What was found; its `warning` is not None where it is too much.

    Raises:
        TextError: the evaluation text cannot be read.
    """
    text = resolve_text(eval_text, split="test")
    check = OverlapCheck(text.name, text.sha256, overlap(calibration.text(tokenizer), text.raw()))
    progress.note(check.warning or check.sentence())
    return check


def calibration_json(info: CalibrationInfo, check: OverlapCheck) -> dict[str, Any]:
    """Return what a manifest says of a calibration set."""
    return {**info.to_json(), "overlap": check.to_json()}


def context_window(config: LlamaConfig) -> int:
    """Window length where none is asked for: the model's context, at most `MAX_DEFAULT_WINDOW` tokens."""
    return min(config.max_position_embeddings, MAX_DEFAULT_WINDOW)


def record_calibration(
    path: str, source: CalibrationInput, out: Path, *, seed: int = 0, force: bool = False, progress: Progress = SILENT
) -> CalibrationSet:
    """Record token windows for the tokenizer of a checkpoint and write them to `out`.

    Raises:
        UsageError: more than one kind of source is named.
        TextError: the source cannot be read, or has too few tokens.
        OutputError: `out` exists and `force` is not set.
    """
    check_absent(out, force=force)
    options = {"calibration": source.sources, "text": source.text, "dataset": source.dataset, "tasks": source.tasks}
    named = [f"--{option}" for option, value in options.items() if value]
    if len(named) > 1:
        raise UsageError(f"name one source of calibration windows, got {' and '.join(named)}; --calibration takes several.")
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer_for(checkpoint)
    length = source.length or context_window(checkpoint.config)
    recorder = InputRecorder(tokenizer, source.windows, length, seed, source.chat_template)
    if source.dataset:
        recorded = recorder.record_dataset(source.dataset, column=source.column)
    elif source.tasks:
        recorded = recorder.record_tasks([name.strip() for name in source.tasks.split(",") if name.strip()])
    elif source.text:
        recorded = recorder.record_text(source.text)
    else:
        sources = CalibrationSource(source.sources, source.windows, length, source.column, source.chat_template)
        recorded = calibration_set(tokenizer, checkpoint.config, sources, seed=seed, progress=progress)
    recorded.save(out, force=force)
    return recorded
