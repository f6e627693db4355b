"""Texts for calibration and evaluation: where they come from, how they are cut, and what they are called in a result.

Where no text is named, it is WikiText-2 (Merity et al., arXiv:1609.07843) if it can be had, else the bundled sample.
Evaluation reads the `test` split and calibration the `train` split, so the one is never the other.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llmq.errors import TextError
from llmq.files import sha256_text
from llmq.model.tokenizer import Tokenizer

Split = Literal["train", "validation", "test"]

WIKITEXT_DIR = "LLMQ_WIKITEXT_DIR"
REACH_TIMEOUT_S = 3.0
"""How long the hub has to answer before the next source is taken."""

# The names these files are published under, raw text before the variant in which rare words are <unk>.
_SPLIT_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.raw.txt", "wiki.train.raw", "train.tokens.txt", "wiki.train.tokens"),
    "validation": ("valid.raw.txt", "wiki.valid.raw", "valid.tokens.txt", "wiki.valid.tokens"),
    "test": ("test.raw.txt", "wiki.test.raw", "test.tokens.txt", "wiki.test.tokens"),
}
_SAMPLE_FILES: dict[Split, str] = {"train": "calibration.txt", "validation": "evaluation.txt", "test": "evaluation.txt"}


class _UnavailableError(Exception):
    """A source that cannot be had here; its text says why."""


@dataclass(frozen=True)
class TextSource:
    """A text, as its lines, with the three forms that the protocols read it in.

    Attributes:
        name: what it is called in tables and records, with the source that was used.
        origin: path or address it was read from, and why no earlier source was.
        lines: the lines of the file, without their newlines.
    """

    name: str
    origin: str
    lines: tuple[str, ...]

    @cached_property
    def is_wikitext(self) -> bool:
        """Whether it is laid out as WikiText: every line that is not blank begins and ends with a space."""
        return all(line[0] == line[-1] == " " for line in self.lines if line.strip())

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The rows as Hugging Face's `wikitext` has them: a line with its newline; '' for a blank line."""
        return tuple(f"{line}\n" if line.strip() else "" for line in self.lines)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `raw()`."""
        return sha256_text(self.raw())

    def raw(self) -> str:
        """The text as a file. WikiText's own files write a blank line as one space (llama.cpp reads `wiki.test.raw`)."""
        blank = " " if self.is_wikitext else ""
        return "".join(f"{line if line.strip() else blank}\n" for line in self.lines)

    def joined(self) -> str:
        """The rows joined by two newlines: what the GPTQ papers evaluate on."""
        return "\n\n".join(self.rows)

    def documents(self) -> tuple[str, ...]:
        """The pages of `EleutherAI/wikitext_document_level`, which lm-eval reads; a text without headings is one page.

        A page starts at a line ' = Title = '. That includes a line of a formula that looks like one: the published split
        has 62 pages of 60 articles for this reason, and so has this.
        """
        pages: list[str] = []
        page: list[str] = []
        for line in self.raw().split("\n"):
            if _is_title(line):
                pages.append("\n".join(page))
                page = []
            page.append(line)
        pages.append("\n".join(page))
        return tuple(page for page in pages if page.strip())


def _is_title(line: str) -> bool:
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    return heading.startswith("= ") and heading.endswith(" =")


def resolve_text(named: str | Path | None = None, *, split: Split) -> TextSource:
    """Find a text: the one that is named, else WikiText-2's split from a folder or from `datasets`, else the bundled sample.

    Args:
        named: a UTF-8 text file, or a folder with the files of WikiText-2; None takes the first of the folder that the
            environment variable LLMQ_WIKITEXT_DIR names, `datasets` (within seconds, or not at all), and the bundled sample.
        split: 'test' to evaluate, 'train' to calibrate, 'validation' to choose between options.

    Returns:
        The text; its name says which source it is.

    Raises:
        TextError: the text or folder that was named (by argument or variable) is missing, empty or not UTF-8.
    """
    if named is not None:
        path = Path(named)
        if path.is_dir():
            file = _split_file(path, split, what="folder")
            return _read(file, f"{path.resolve().name}/{file.name}")
        return _read(path, path.name)
    folder = os.environ.get(WIKITEXT_DIR)
    if folder:
        file = _split_file(Path(folder), split, what=f"{WIKITEXT_DIR} folder")
        variant = "raw" if "raw" in file.name else "words, rare ones <unk>"
        return _read(file, f"WikiText-2 {split} ({variant}; {WIKITEXT_DIR})")
    try:
        return _from_datasets(split)
    except _UnavailableError as reason:
        return _bundled(split, str(reason))


def _split_file(folder: Path, split: Split, *, what: str) -> Path:
    for name in _SPLIT_FILES[split]:
        if (folder / name).is_file():
            return folder / name
    raise TextError(f"{what} {folder} holds no {split} split; one of {', '.join(_SPLIT_FILES[split])} is expected there.")


def _read(path: Path, name: str) -> TextSource:
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise TextError(f"cannot read text {path}: {error.strerror}; name a UTF-8 text file.") from error
    except UnicodeDecodeError as error:
        raise TextError(f"text {path} is not UTF-8 (byte {error.start}); convert it, or name another.") from error
    return text_from_string(text, name=name, origin=str(path))


def text_from_string(text: str, *, name: str, origin: str) -> TextSource:
    """Make a source of a text at hand; raises TextError when it is blank."""
    if not text.strip():
        raise TextError(f"text {origin} is empty; name one with words in it.")
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return TextSource(name, origin, tuple(lines))


def _bundled(split: Split, why: str) -> TextSource:
    path = Path(str(files("llmq") / "assets" / "sample" / _SAMPLE_FILES[split]))
    text = _read(path, f"bundled sample ({path.stem} half)")
    return TextSource(text.name, f"llmq/assets/sample/{path.name}; {why}", text.lines)


def _from_datasets(split: Split) -> TextSource:
    """Load a raw split through `datasets`; raises _UnavailableError with the reason."""
    import huggingface_hub.constants as hub

    problem = None if hub.HF_HUB_OFFLINE else hub_problem()
    if problem:
        raise _UnavailableError(f"WikiText-2 is not to be had through datasets: {problem}")
    try:
        import datasets

        loaded = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except (ImportError, OSError, ValueError) as error:  # ConnectionError and every error of the hub are OSErrors
        mode = " (HF_HUB_OFFLINE is set)" if hub.HF_HUB_OFFLINE else ""
        raise _UnavailableError(f"WikiText-2 is not to be had through datasets{mode}: {error}") from error
    lines = tuple(row.removesuffix("\n") for row in loaded["text"])
    return TextSource(f"WikiText-2 {split} (raw; datasets)", "datasets: Salesforce/wikitext, wikitext-2-raw-v1", lines)


def hub_problem() -> str | None:
    """Return why the hub cannot be reached, within seconds; None: it answers. `datasets` itself would ask for half a minute."""
    import huggingface_hub.constants as hub

    answers: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(hub.ENDPOINT, method="HEAD")  # noqa: S310 - huggingface_hub's own endpoint
            urllib.request.urlopen(request, timeout=REACH_TIMEOUT_S).close()  # noqa: S310
        except urllib.error.HTTPError:
            pass  # it answers, whatever it says
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))
            return
        answers.append("")

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is silent heeds no timeout
    thread.start()
    thread.join(REACH_TIMEOUT_S)
    problem = answers[0] if answers else f"no answer within {REACH_TIMEOUT_S:g} s"
    return (
        f"{hub.ENDPOINT} cannot be reached ({problem}); HF_HUB_OFFLINE=1 uses a copy that is cached already" if problem else None
    )


def token_stream(tokenizer: Tokenizer, documents: tuple[str, ...] | list[str]) -> Tensor:
    """Encode documents one after another, each after a BOS token where the tokenizer has one.

    Returns:
        [T] int64.
    """
    bos = tokenizer.bos_id is not None
    return torch.tensor([token for document in documents for token in tokenizer.encode(document, bos=bos)], dtype=torch.int64)


def cut_windows(stream: Tensor, n: int, length: int, *, seed: int | None, name: str) -> Tensor:
    """Cut windows that do not overlap out of a token stream.

    Args:
        stream: [T] tokens.
        n: number of windows.
        length: tokens a window.
        seed: draws the windows (their common offset, and which of them); None takes the first `n`.
        name: of the text, for the message.

    Returns:
        [n, length], dtype of `stream`.

    Raises:
        TextError: when the stream has fewer than `n` windows.
    """
    if n < 1 or length < 1:
        raise TextError(f"windows of text {name} must be at least one of at least one token, got {n} of {length}.")
    available = len(stream) // length
    if available < n:
        raise TextError(
            f"text {name} has {len(stream)} tokens, {available} windows of {length}, but {n} are asked for; "
            "choose fewer or shorter windows, or a longer text."
        )
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    if generator is None:
        return stream[: n * length].reshape(n, length)
    offset = int(torch.randint(len(stream) - n * length + 1, (1,), generator=generator)) % length
    windows = stream[offset : offset + (len(stream) - offset) // length * length].reshape(-1, length)
    return windows[torch.randperm(len(windows), generator=generator)[:n]]


def token_windows(tokenizer: Tokenizer, text: TextSource, n: int, length: int, seed: int | None) -> Tensor:
    """Cut `n` windows of `length` tokens out of a text; see `token_stream` and `cut_windows`.

    Returns:
        [n, length] int64.

    Raises:
        TextError: when the text is too short.
    """
    return cut_windows(token_stream(tokenizer, text.documents()), n, length, seed=seed, name=text.name)
