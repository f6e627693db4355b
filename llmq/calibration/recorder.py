"""InputRecorder: token windows from a text, a dataset or lm-eval tasks, as a calibration set that any run can use again.

Windows are full: documents and prompts, each after a BOS token where the tokenizer has one, are laid end to end and cut, so
that short ones are packed and nothing is padded. Padding would weigh into the statistics like text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.calibration.corpus import TextSource, cut_windows, resolve_text, token_stream
from llmq.errors import TextError, TokenizerError
from llmq.files import atomic_path
from llmq.model.tokenizer import Tokenizer

SCHEMA_VERSION = 1
_METADATA_KEY = "llmq.calibration"


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """Where a calibration set comes from. Everything that its tokens depend on is here, and nothing else.

    Attributes:
        kind: what it was recorded from.
        source: name of the text, dataset or tasks.
        source_sha256: of the text that was read.
        tokenizer_sha256: of the tokenizer's file.
        windows: number of windows.
        length: tokens a window.
        seed: of the draw.
        bos: whether each document or prompt begins with BOS.
        sequences: documents or prompts that were encoded.
        tokens_seen: tokens they have together, of which `windows * length` were kept.
        short_sequences: what became of sequences shorter than a window.
    """

    kind: Literal["text", "dataset", "tasks"]
    source: str
    source_sha256: str
    tokenizer_sha256: str
    windows: int
    length: int
    seed: int
    bos: bool
    sequences: int
    tokens_seen: int
    short_sequences: Literal["packed"] = "packed"

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows, int32 [windows, length], and where they come from."""

    tokens: Tensor
    info: CalibrationInfo

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write it as safetensors, whole or not at all; equal sets make equal bytes. OutputError when `path` exists."""
        metadata = {_METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION, **self.info.to_json()}, sort_keys=True)}
        with atomic_path(path, force=force) as temporary:
            save_file({"tokens": self.tokens.contiguous()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path, *, tokenizer: Tokenizer) -> CalibrationSet:
        """Read what `save` wrote.

        Raises:
            TextError: the file is not a calibration set.
            TokenizerError: it was recorded with another tokenizer: its numbers mean other words.
        """
        try:
            with safe_open(path, framework="pt") as file:
                data = json.loads((file.metadata() or {})[_METADATA_KEY])
                tokens = file.get_tensor("tokens")
            version = data.pop("schema_version")
            info = CalibrationInfo(**data)
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise TextError(f"{path} is not a calibration set ({error}); record one with `llmq calibrate`.") from error
        if version != SCHEMA_VERSION or tokens.dtype != torch.int32 or tuple(tokens.shape) != (info.windows, info.length):
            raise TextError(f"calibration set {path} is damaged, or of another version of llmq; record it again.")
        if info.tokenizer_sha256 != tokenizer.sha256:
            raise TokenizerError(
                f"calibration set {path} was recorded with another tokenizer (sha256 {info.tokenizer_sha256[:12]}…, this one is "
                f"{tokenizer.sha256[:12]}…); record it again with this checkpoint's."
            )
        return cls(tokens, info)

    def text(self, tokenizer: Tokenizer) -> str:
        """Return the windows as text, one after another, to look for overlap with an evaluation text."""
        return "\n".join(tokenizer.decode(window) for window in self.tokens.tolist())


@dataclass(frozen=True, slots=True)
class InputRecorder:
    """Records what a model would be fed.

    Attributes:
        tokenizer: of the model.
        windows: number of windows to record.
        length: tokens a window.
        seed: of every draw.
    """

    tokenizer: Tokenizer
    windows: int = 128
    length: int = 2048
    seed: int = 0

    def record_text(self, text: TextSource | str | Path) -> CalibrationSet:
        """Record windows from anywhere in a text.

        Args:
            text: a source, or the path of a text file or WikiText-2 folder.

        Raises:
            TextError: the text cannot be read, or is too short.
        """
        source = text if isinstance(text, TextSource) else resolve_text(text, split="train")
        documents = source.documents()
        stream = token_stream(self.tokenizer, documents)
        tokens = cut_windows(stream, self.windows, self.length, seed=self.seed, name=source.name)
        return self._finish(tokens, "text", source.name, source.sha256, (len(documents), len(stream)))

    def record_dataset(self, dataset: Any, *, column: str = "text", split: str = "train") -> CalibrationSet:
        """Record windows from a dataset's rows, taken in random order until there are enough.

        Args:
            dataset: a `datasets.Dataset`, any sequence of dicts, a folder that `save_to_disk` wrote, a local JSON Lines file
                (one object a line), or the name of a dataset for `datasets.load_dataset`.
            column: of the rows' text.
            split: of a dataset that has several.

        Raises:
            TextError: the dataset, split or column is not there, or there is too little text.
        """
        rows, name = _open_dataset(dataset, split)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        if rows and column not in rows[0]:
            raise TextError(
                f"dataset {name} has no column {column!r}; it has {', '.join(sorted(rows[0]))}: name one with --column."
            )
        encoded: list[list[int]] = []
        digest = sha256()
        seen = 0
        for row in order:
            text = rows[row][column]
            if not isinstance(text, str):
                raise TextError(f"column {column!r} of dataset {name} holds {type(text).__name__}, not text; name another.")
            if not text.strip():
                continue
            encoded.append(self._encode(text))
            digest.update(text.encode() + b"\0")
            seen += len(encoded[-1])
            if seen >= self.windows * self.length:
                break
        return self._pack(encoded, "dataset", name, digest.hexdigest())

    def record_tasks(
        self, tasks: Sequence[str], *, limit: int | None = None, num_fewshot: int | None = None, include_path: Path | None = None
    ) -> CalibrationSet:
        """Record the prompts, with their continuations, that lm-eval would feed the model for these tasks.

        These are documents that the tasks score: do not judge a model by tasks it was calibrated on.

        Args:
            tasks: names of lm-eval tasks.
            limit: documents a task; None: all.
            num_fewshot: examples in each prompt; None: the task's own number.
            include_path: folder of further task files.

        Raises:
            TextError: a task is unknown or cannot be loaded, or there is too little text.
        """
        from llmq.calibration.task_recorder import record_requests

        encoded = record_requests(
            self.tokenizer, tasks, limit=limit, num_fewshot=num_fewshot, include_path=include_path, seed=self.seed
        )
        digest = sha256()
        for sequence in encoded:
            digest.update(str(sequence).encode())
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(self.seed)).tolist()
        name = f"lm-eval {','.join(tasks)}"
        return self._pack([self._begin(encoded[index]) for index in order], "tasks", name, digest.hexdigest())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=self.tokenizer.bos_id is not None)

    def _begin(self, sequence: list[int]) -> list[int]:
        """Put BOS before a sequence that has none."""
        bos = self.tokenizer.bos_id
        return sequence if bos is None or sequence[:1] == [bos] else [bos, *sequence]

    def _pack(self, encoded: list[list[int]], kind: Literal["dataset", "tasks"], name: str, digest: str) -> CalibrationSet:
        stream = torch.tensor([token for sequence in encoded for token in sequence], dtype=torch.int64)
        tokens = cut_windows(stream, self.windows, self.length, seed=None, name=name)
        return self._finish(tokens, kind, name, digest, (len(encoded), len(stream)))

    def _finish(
        self, tokens: Tensor, kind: Literal["text", "dataset", "tasks"], name: str, digest: str, counts: tuple[int, int]
    ) -> CalibrationSet:
        info = CalibrationInfo(
            kind=kind,
            source=name,
            source_sha256=digest,
            tokenizer_sha256=self.tokenizer.sha256,
            windows=self.windows,
            length=self.length,
            seed=self.seed,
            bos=self.tokenizer.bos_id is not None,
            sequences=counts[0],
            tokens_seen=counts[1],
        )
        return CalibrationSet(tokens.to(torch.int32), info)


def _open_dataset(dataset: Any, split: str) -> tuple[Sequence[dict[str, Any]], str]:
    """Return the rows of a dataset, and its name."""
    if not isinstance(dataset, str | Path):
        return dataset, getattr(getattr(dataset, "info", None), "dataset_name", None) or "in memory"
    path = Path(dataset)
    if path.is_file():
        return _read_jsonl(path), path.name
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(str(dataset), split=split)
    except (OSError, ValueError) as error:  # every error of the hub is an OSError
        raise TextError(
            f"dataset {dataset} cannot be loaded ({error}); name a local JSON Lines file, a folder of save_to_disk, or a dataset "
            "that this machine can reach."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TextError(f"dataset {dataset} has no split {split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[split]
    return loaded, path.name if path.is_dir() else str(dataset)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read dataset {path}: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(
                f"line {number} of {path} is not JSON ({error.msg}); a dataset file has one object a line."
            ) from error
        if not isinstance(row, dict):
            raise TextError(f"line {number} of {path} is not a JSON object; a dataset file has one object a line.")
        rows.append(row)
    return rows
