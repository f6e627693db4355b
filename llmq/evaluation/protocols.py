"""The named perplexity protocols: which text is fed in which pieces, which tokens are scored, what the sum is divided by.

A perplexity means nothing without these choices: of the same weights and the same articles, published figures differ by more
than half, where each is right under its own protocol. So a protocol is a value with a name, a version and typed parameters, it
is stored with every result, and results of different protocols are never compared. docs/protocols.md defines each in words; a
change of meaning raises `version`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from llmq.calibration.corpus import TextSource
from llmq.errors import TextError, TokenizerError, UsageError, suggest
from llmq.evaluation.detokenize import detokenize_wikitext
from llmq.model.tokenizer import Tokenizer
from llmq.results import record

MAX_DEFAULT_LENGTH = 2048
"""Longest window that is chosen without being asked for: the papers' length, and a bound on memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass of one sequence. The logits of the last S positions are scored against `targets`."""

    inputs: Tensor
    """int64 [T]: what the model reads."""
    targets: Tensor
    """int64 [S], S <= T: the token that follows each of the last S inputs."""
    document: int
    """Which document the window belongs to; 0 throughout where the protocol knows no documents."""


@dataclass(frozen=True, slots=True)
class DocumentSize:
    """Size of an original document, before anything was undone in it."""

    words: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a protocol made of a text."""

    windows: list[Window]
    bos: str
    """The BOS policy, in words."""
    documents: tuple[DocumentSize, ...] | None
    """One a document, where every token of the documents is scored, so that a loss per word and byte is defined; else None."""


class PerplexityProtocol(BaseModel, ABC):
    """A protocol with its parameters.

    Attributes:
        length: most tokens a window holds, BOS included.
        limit: only the first so many windows, or documents (see `pieces`), are evaluated; None: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    pieces: ClassVar[str] = "windows"
    """What `limit` counts."""

    length: int = Field(ge=4)
    limit: int | None = Field(None, ge=1)

    @abstractmethod
    def cut(self, tokenizer: Tokenizer, text: TextSource) -> Pieces:
        """Cut `text` into windows.

        Raises:
            TextError: the text is too short for a single window.
        """

    def describe(self) -> record.Protocol:
        """The protocol as plain data: its name, version and every parameter."""
        return record.Protocol(name=self.name, version=self.version, params=self.model_dump())


class Windows(PerplexityProtocol):
    """The GPTQ papers' protocol: one token stream cut into windows that do not overlap; the tail is dropped."""

    name: ClassVar[str] = "windows"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "windows that do not overlap, as in the GPTQ papers; BOS at the very start only"

    def cut(self, tokenizer: Tokenizer, text: TextSource) -> Pieces:
        """See `PerplexityProtocol.cut`."""
        has_bos = tokenizer.bos_id is not None
        chunks = _chunks(tokenizer.encode(text.joined(), bos=has_bos), self.length, self.limit, text)
        windows = [Window(chunk[:-1], chunk[1:], 0) for chunk in chunks]
        return Pieces(windows, "one, at the start of the text" if has_bos else "none: the tokenizer has no BOS", None)


class LlamaCpp(PerplexityProtocol):
    """llama.cpp's `perplexity` tool: each chunk starts with BOS, and only its second half is scored."""

    name: ClassVar[str] = "llamacpp"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "second half of each window, BOS over its first token, as llama.cpp's perplexity tool"

    def cut(self, tokenizer: Tokenizer, text: TextSource) -> Pieces:
        """See `PerplexityProtocol.cut`."""
        bos = tokenizer.bos_id
        first = self.length // 2  # logits of positions first … length - 2 are scored
        windows = []
        for chunk in _chunks(tokenizer.encode(text.raw().removesuffix("\n"), bos=bos is not None), self.length, self.limit, text):
            inputs = chunk[:-1].clone()
            if bos is not None:
                inputs[0] = bos
            windows.append(Window(inputs, chunk[first + 1 :], 0))
        policy = "replaces the first token of each window" if bos is not None else "none: the tokenizer has no BOS"
        return Pieces(windows, policy, None)


class LmEvalWord(PerplexityProtocol):
    """lm-eval's `wikitext` task: whole documents, detokenised, every token scored, per word and byte of the original."""

    name: ClassVar[str] = "lmeval-word"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "every token of each document, per word of the original, as lm-eval's wikitext task"
    pieces: ClassVar[str] = "documents"

    def cut(self, tokenizer: Tokenizer, text: TextSource) -> Pieces:
        """See `PerplexityProtocol.cut`."""
        prefix, policy = prefix_token(tokenizer)
        windows: list[Window] = []
        sizes: list[DocumentSize] = []
        for number, page in enumerate(islice(text.documents(), self.limit)):
            tokens = tokenizer.encode(detokenize_wikitext(page))
            windows += [Window(torch.tensor(a), torch.tensor(b), number) for a, b in rolling_windows(tokens, prefix, self.length)]
            sizes.append(DocumentSize(len(re.split(r"\s+", page)), len(page.encode())))
        if not windows:
            raise TextError(f"text {text.name} has no token to score; name a text with words in it.")
        return Pieces(windows, policy, tuple(sizes))


_PROTOCOLS: Mapping[str, type[PerplexityProtocol]] = {kind.name: kind for kind in (Windows, LlamaCpp, LmEvalWord)}


def protocol_names() -> dict[str, str]:
    """Return each protocol's name and what it is, in one line."""
    return {name: kind.summary for name, kind in _PROTOCOLS.items()}


def default_length(context: int) -> int:
    """Return the window length where none is asked for: the model's `context`, at most `MAX_DEFAULT_LENGTH` tokens."""
    return min(context, MAX_DEFAULT_LENGTH)


def resolve_protocol(name: str, params: Mapping[str, Any] | None = None, *, context: int) -> PerplexityProtocol:
    """Return the protocol `name` with `params`; those that are None take their default.

    Args:
        name: one of `protocol_names()`.
        params: `length` in tokens (default: `default_length(context)`), `limit` in windows or documents (default: all);
            numbers, or text that is one.
        context: most tokens the model reads at once.

    Raises:
        UsageError: the name or a parameter is unknown, or a value is not allowed.
    """
    if name not in _PROTOCOLS:
        raise UsageError(f"unknown perplexity protocol {name!r}.{suggest(name, list(_PROTOCOLS))}")
    kind = _PROTOCOLS[name]
    given = {"length": default_length(context)} | {key: value for key, value in (params or {}).items() if value is not None}
    for key in given:
        if key not in kind.model_fields:
            raise UsageError(f"protocol {name} has no parameter {key!r}.{suggest(key, list(kind.model_fields))}")
    try:
        protocol = kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UsageError(
            f"parameter {problem['loc'][0]} of protocol {name} is {problem['input']!r}: {problem['msg'].lower()}."
        ) from error
    check_length(protocol, context)
    return protocol


def check_length(protocol: PerplexityProtocol, context: int) -> None:
    """Raise UsageError when the protocol's windows are longer than the model's `context`."""
    if protocol.length > context:
        raise UsageError(
            f"protocol {protocol.name} asks for windows of {protocol.length} tokens, but the model reads at most {context}; "
            f"choose a length of at most {context}."
        )


def prefix_token(tokenizer: Tokenizer) -> tuple[int, str]:
    """Return the token that a document without context is conditioned on, BOS or else EOS, and that choice in words."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id, "BOS before each document, not scored"
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id, "EOS before each document, not scored (the tokenizer has no BOS)"
    raise TokenizerError(
        "the tokenizer has neither BOS nor EOS, so the first token of a document has nothing to be conditioned on; "
        "choose the protocol windows, which needs neither."
    )


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut `tokens` into pairs (inputs, targets) in which every token is a target exactly once, as lm-eval does.

    The first window reads `prefix` and the first `length - 1` tokens. Each later one reads the last token before its targets,
    so that its first target is conditioned on one token. The last one is as long as the others: where fewer tokens are left,
    it reads tokens that were scored before as further context.
    """
    stream = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        yield stream[max(0, end - length) : end], stream[start + 1 : end + 1]


def _chunks(tokens: list[int], length: int, limit: int | None, text: TextSource) -> list[Tensor]:
    count = len(tokens) // length
    if count == 0:
        raise TextError(
            f"text {text.name} has {len(tokens)} tokens, too few for one window of {length}; "
            "choose a longer text or a shorter window."
        )
    count = count if limit is None else min(count, limit)
    return list(torch.tensor(tokens[: count * length]).view(count, length))
