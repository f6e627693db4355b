"""Streams: the tokens of one source of calibration windows, before windows are cut out of them.

Documents, rows, chats and prompts, each after a BOS token where the tokenizer has one, are laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmq.calibration.chat import CHAT_KEYS, ChatTemplate, find_chat_template, messages_of
from llmq.calibration.corpus import TextSource, cut_windows, token_stream
from llmq.calibration.rows import open_dataset
from llmq.errors import TextError
from llmq.files import sha256_file
from llmq.model.tokenizer import Tokenizer

Kind = Literal["text", "dataset", "chat", "tasks"]


@dataclass(frozen=True)
class Stream:
    """The tokens of one source.

    Attributes:
        kind: what it was read as.
        name: of the source.
        sha256: of the file's bytes; of the texts, as they were read, where it is no single file.
        text_sha256: of the text, or of the rows that were read.
        tokens: [T] int64.
        sequences: documents, rows or prompts in it.
        drawn: they come in random order already, so windows are cut from the start; of a text, from anywhere.
        template_sha256: of the chat template that wrote the rows; None: none did.
    """

    kind: Kind
    name: str
    sha256: str
    text_sha256: str
    tokens: Tensor
    sequences: int
    drawn: bool
    template_sha256: str | None = None

    def available(self, length: int) -> int:
        """Return how many windows of `length` tokens there are."""
        return len(self.tokens) // length

    def windows(self, n: int, length: int, seed: int) -> Tensor:
        """Cut windows [n, length]; raises TextError when there are fewer."""
        return cut_windows(self.tokens, n, length, seed=None if self.drawn else seed, name=self.name)


def text_stream(tokenizer: Tokenizer, text: TextSource) -> Stream:
    """Encode a text, page by page."""
    documents = text.documents()
    tokens = token_stream(tokenizer, documents)
    file = Path(text.origin)
    return Stream(
        kind="text",
        name=text.name,
        sha256=sha256_file(file) if file.is_file() else text.sha256,
        text_sha256=text.sha256,
        tokens=tokens,
        sequences=len(documents),
        drawn=False,
    )


def rows_stream(
    tokenizer: Tokenizer,
    dataset: Any,
    *,
    column: str = "text",
    split: str = "train",
    chat_template: str | None = None,
    enough: int,
    seed: int,
) -> Stream:
    """Encode rows in random order until there are `enough` tokens, or no more rows.

    A row's text is its `column`; where it has none, its chat in `messages` or `conversations`. A column that holds a list is
    a chat too.

    Args:
        tokenizer: of the model; a chat needs the template beside it, unless one is named.
        dataset: see `rows.open_dataset`.
        column: of the rows' text.
        split: of a dataset that has several.
        chat_template: a file; None: the one beside the tokenizer.
        enough: tokens.
        seed: of the order.

    Raises:
        TextError: the dataset, split, column or template is not there, or a row holds something else.
    """
    rows, name = open_dataset(dataset, split)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    template: ChatTemplate | None = None
    encoded: list[int] = []
    sequences = 0
    digest = sha256()
    for index in order:
        row, what = rows[index], f"row {index + 1} of dataset {name}"
        value = _value(row, column, name)
        if isinstance(value, list):
            template = template or find_chat_template(tokenizer, chat_template)
            text = template.render(messages_of(value, what), tokenizer, what=what, tools=row.get("tools"))
        else:
            text = value
        if not text.strip():
            continue
        if isinstance(value, list) and template is not None:
            encoded += template.encode(text, tokenizer)
        else:
            encoded += tokenizer.encode(text, bos=tokenizer.bos_id is not None)
        sequences += 1
        digest.update(text.encode() + b"\0")
        if len(encoded) >= enough:
            break
    file = Path(dataset) if isinstance(dataset, str | Path) else None
    return Stream(
        kind="dataset" if template is None else "chat",
        name=name,
        sha256=sha256_file(file) if file is not None and file.is_file() else digest.hexdigest(),
        text_sha256=digest.hexdigest(),
        tokens=torch.tensor(encoded, dtype=torch.int64),
        sequences=sequences,
        drawn=True,
        template_sha256=None if template is None else template.sha256,
    )


def _value(row: dict[str, Any], column: str, name: str) -> str | list[Any]:
    """Return a row's text or chat."""
    value = row.get(column)
    if value is None and column not in row:
        value = next((row[key] for key in CHAT_KEYS if isinstance(row.get(key), list)), None)
        if value is None:
            raise TextError(f"dataset {name} has no column {column!r}; it has {', '.join(sorted(row))}: name one with --column.")
    if not isinstance(value, str | list):
        raise TextError(f"column {column!r} of dataset {name} holds {type(value).__name__}, not text; name another.")
    return value


def prompt_stream(tokenizer: Tokenizer, encoded: Sequence[list[int]], *, name: str, seed: int) -> Stream:
    """Lay encoded prompts end to end in random order."""
    digest = sha256()
    for sequence in encoded:
        digest.update(str(sequence).encode())
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    bos = tokenizer.bos_id
    begun = [encoded[index] if bos is None or encoded[index][:1] == [bos] else [bos, *encoded[index]] for index in order]
    return Stream(
        kind="tasks",
        name=name,
        sha256=digest.hexdigest(),
        text_sha256=digest.hexdigest(),
        tokens=torch.tensor([token for sequence in begun for token in sequence], dtype=torch.int64),
        sequences=len(encoded),
        drawn=True,
    )
