"""InputRecorder: token windows from texts, datasets, chats or lm-eval tasks, as a calibration set that any run can use again.

Windows are full: documents and prompts, each after a BOS token where the tokenizer has one, are laid end to end and cut, so
that short ones are packed and nothing is padded. Padding would weigh into the statistics like text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.mixture import WeightedSource, largest_mixture, share_out
from llmq.calibration.rows import HUB, is_rows
from llmq.calibration.streams import Kind, Stream, prompt_stream, rows_stream, text_stream
from llmq.errors import TextError, TokenizerError, UsageError
from llmq.files import atomic_path
from llmq.model.tokenizer import Tokenizer

SCHEMA_VERSION = 2
DEFAULT_WINDOWS = 128
"""Windows where no number is asked for and the sources have as many."""
_METADATA_KEY = "llmq.calibration"


@dataclass(frozen=True, slots=True)
class CalibrationPart:
    """One source of a calibration set, and what it gave.

    Attributes:
        name: of the text, file, dataset or tasks.
        kind: what it was read as.
        sha256: of the file's bytes; of the texts, as they were read, where it is no single file.
        weight: as it was asked for.
        windows: number of its windows.
        sequences: documents, rows or prompts that were encoded.
        tokens_seen: tokens they have together.
        template_sha256: of the chat template that wrote its rows; None: none did.
    """

    name: str
    kind: Kind
    sha256: str
    weight: float
    windows: int
    sequences: int
    tokens_seen: int
    template_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """Where a calibration set comes from. Everything that its tokens depend on is here, and nothing else.

    Attributes:
        kind: what it was recorded from; several sources are a mixture.
        source: name of the text, dataset or tasks; of a mixture all of them with their shares.
        source_sha256: of the text that was read; of a mixture, of those of its parts.
        tokenizer_sha256: of the tokenizer's file.
        windows: number of windows.
        length: tokens a window.
        seed: of the draw, and of the order of a mixture.
        bos: whether each document or prompt begins with BOS.
        sequences: documents or prompts that were encoded.
        tokens_seen: tokens they have together, of which `windows * length` were kept.
        short_sequences: what became of sequences shorter than a window.
        parts: the sources, one by one.
    """

    kind: Kind | Literal["mixture"]
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
    parts: tuple[CalibrationPart, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `from_json` reads it."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CalibrationInfo:
        """Inverse of `to_json`."""
        return cls(**{**data, "parts": tuple(CalibrationPart(**part) for part in data["parts"])})


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
            info = CalibrationInfo.from_json(data)
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
        windows: number of windows to record; None: `DEFAULT_WINDOWS`, or as many as there are.
        length: tokens a window.
        seed: of every draw.
        chat_template: a file with the template that chats are rendered with; None: the one beside the tokenizer.
    """

    tokenizer: Tokenizer
    windows: int | None = DEFAULT_WINDOWS
    length: int = 2048
    seed: int = 0
    chat_template: str | None = None

    def record_text(self, text: TextSource | str | Path) -> CalibrationSet:
        """Record windows from anywhere in a text.

        Args:
            text: a source, or the path of a text file or WikiText-2 folder.

        Raises:
            TextError: the text cannot be read, or is too short.
        """
        source = text if isinstance(text, TextSource) else resolve_text(text, split="train")
        return self._record([text_stream(self.tokenizer, source)], [1.0])

    def record_dataset(self, dataset: Any, *, column: str = "text", split: str = "train") -> CalibrationSet:
        """Record windows from a dataset's rows, taken in random order until there are enough.

        Args:
            dataset: a `datasets.Dataset`, any sequence of dicts, a folder that `save_to_disk` wrote, a local JSON Lines file
                (one object a line), or the name of a dataset for `datasets.load_dataset`.
            column: of the rows' text. Where a row has no such column, its chat in `messages` or `conversations` is taken.
            split: of a dataset that has several.

        Raises:
            TextError: the dataset, split or column is not there, or there is too little text.
        """
        return self._record([self._rows(dataset, column, split, 1.0)], [1.0])

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
        return self._record([prompt_stream(self.tokenizer, encoded, name=f"lm-eval {','.join(tasks)}", seed=self.seed)], [1.0])

    def record_sources(self, sources: Sequence[WeightedSource], *, column: str = "text") -> CalibrationSet:
        """Record windows from several sources, shared out by their weights, in an order drawn by the seed.

        A source is a UTF-8 text, a WikiText-2 folder, a file of rows or chats (JSON Lines), a folder of `save_to_disk`, or
        `hf:NAME[:CONFIG]` for `datasets.load_dataset`; None is the default text.

        Args:
            sources: at least one.
            column: of the text in rows.

        Raises:
            TextError: a source cannot be read, or has too little text for its share.
            UsageError: a weight is so small that its source would give no window.
        """
        total = sum(each.weight for each in sources)
        streams = [self._open(each.source, column, each.weight / total) for each in sources]
        return self._record(streams, [each.weight for each in sources])

    def _open(self, source: str | None, column: str, share: float) -> Stream:
        if source is None:
            return text_stream(self.tokenizer, resolve_text(split="train"))
        if source.startswith(HUB):
            return self._rows(source, column, "train", share)
        path = Path(source)
        if not path.exists():
            raise TextError(
                f"calibration source {source} does not exist; name a file or folder, or a dataset of the hub as {HUB}NAME."
            )
        if is_rows(path):
            return self._rows(path, column, "train", share)
        return text_stream(self.tokenizer, resolve_text(path, split="train"))

    def _rows(self, dataset: Any, column: str, split: str, share: float) -> Stream:
        windows = DEFAULT_WINDOWS if self.windows is None else self.windows
        enough = (windows if share == 1 else math.ceil(windows * share) + 1) * self.length
        return rows_stream(
            self.tokenizer,
            dataset,
            column=column,
            split=split,
            chat_template=self.chat_template,
            enough=enough,
            seed=self.seed,
        )

    def _record(self, streams: list[Stream], weights: list[float]) -> CalibrationSet:
        shares = self._shares(streams, weights)
        tokens = torch.cat([stream.windows(share, self.length, self.seed) for stream, share in zip(streams, shares, strict=True)])
        if len(streams) > 1:
            tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self.seed))]
        parts = tuple(
            CalibrationPart(
                name=stream.name,
                kind=stream.kind,
                sha256=stream.sha256,
                weight=weight,
                windows=share,
                sequences=stream.sequences,
                tokens_seen=len(stream.tokens),
                template_sha256=stream.template_sha256,
            )
            for stream, weight, share in zip(streams, weights, shares, strict=True)
        )
        one = len(streams) == 1
        info = CalibrationInfo(
            kind=streams[0].kind if one else "mixture",
            source=streams[0].name if one else " + ".join(f"{part.windows}/{sum(shares)} {part.name}" for part in parts),
            source_sha256=streams[0].text_sha256 if one else _joint_hash(streams, shares),
            tokenizer_sha256=self.tokenizer.sha256,
            windows=sum(shares),
            length=self.length,
            seed=self.seed,
            bos=self.tokenizer.bos_id is not None,
            sequences=sum(stream.sequences for stream in streams),
            tokens_seen=sum(len(stream.tokens) for stream in streams),
            parts=parts,
        )
        return CalibrationSet(tokens.to(torch.int32), info)

    def _shares(self, streams: list[Stream], weights: list[float]) -> list[int]:
        windows = self.windows
        if windows is None:
            available = [stream.available(self.length) for stream in streams]
            shares = largest_mixture(weights, available, DEFAULT_WINDOWS)
            if shares is not None:
                return shares
            windows = len(streams)  # too few: the first source that lacks one says so
        shares = share_out(weights, windows)
        without = next((stream.name for stream, share in zip(streams, shares, strict=True) if share == 0 < windows), None)
        if without is not None:
            raise UsageError(
                f"calibration source {without} would give none of {windows} windows; give it more weight, ask for more windows, "
                "or leave it out."
            )
        return shares


def _joint_hash(streams: list[Stream], shares: list[int]) -> str:
    """One hash of what was read from all sources, and of how much of each was kept."""
    digest = sha256()
    for stream, share in zip(streams, shares, strict=True):
        digest.update(f"{stream.text_sha256} {share}\n".encode())
    return digest.hexdigest()
