"""Text to tokens and back, for the three kinds of tokenizer that Llama checkpoints come with.

    sentencepiece   a SentencePiece model (Llama 1 and 2, Mistral, llama2.c, the demo)
    tokenizers      Hugging Face's tokenizer.json (Llama 3 and Qwen2 as Hugging Face ships them)
    tiktoken        lines of "base64-of-the-token rank" (Llama 3 as Meta ships it)

The kind is read from the file's first bytes, never from its name. `encode` adds nothing to the text but the BOS token it is
asked for. tokenizers and tiktoken map the spelling of a special token ("<|eot_id|>") to that token, as transformers does;
SentencePiece takes every text as plain text.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from llmq.errors import TokenizerError
from llmq.files import sha256_file

TokenizerKind = Literal["sentencepiece", "tokenizers", "tiktoken"]

_PREFERENCE: tuple[TokenizerKind, ...] = ("tokenizers", "tiktoken", "sentencepiece")
"""Which one is used when a folder holds several: tokenizer.json comes first, because only it has tokens added later."""

# Llama 3's own split of a text into words (facts of the model: without this very pattern its ranks make other tokens).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = 256
_LLAMA3_BOS, _LLAMA3_EOS = "<|begin_of_text|>", "<|end_of_text|>"
# The special tokens that have a meaning, by their distance from the first; all others are "reserved".
_LLAMA3_NAMED = {
    0: _LLAMA3_BOS,
    1: _LLAMA3_EOS,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_UNFINISHED = "\ufffd"
_HEAD_BYTES = 4096


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def kind(self) -> TokenizerKind:
        """Which library reads it."""
        ...

    @property
    def path(self) -> Path:
        """The file it was read from."""
        ...

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one: the number of embedding rows that a model needs."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None: there is none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text; None: there is none."""
        ...

    @property
    def bos_token(self) -> str | None:
        """How the BOS token is written; None: there is none."""
        ...

    @property
    def eos_token(self) -> str | None:
        """How the EOS token is written; None: there is none."""
        ...

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        ...

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Return the ids of `text`, after the BOS token if `bos`; TokenizerError when there is no such token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens (BOS, EOS …) have none."""
        ...


class _FileTokenizer(ABC):
    """What the three kinds share: where they came from, and how BOS is put before a text."""

    def __init__(self, path: Path, bos_id: int | None, eos_id: int | None) -> None:
        self.path = path
        self.bos_id = bos_id
        self.eos_id = eos_id

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return sha256_file(self.path)

    @property
    def bos_token(self) -> str | None:
        """See `Tokenizer.bos_token`."""
        return None if self.bos_id is None else self._spelling(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        """See `Tokenizer.eos_token`."""
        return None if self.eos_id is None else self._spelling(self.eos_id)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        if not bos:
            return self._encode(text)
        if self.bos_id is None:
            raise TokenizerError(f"tokenizer {self.path} has no BOS token; encode without one.")
        return [self.bos_id, *self._encode(text)]

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _spelling(self, token: int) -> str: ...


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226)."""

    kind: TokenizerKind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise TokenizerError(f"tokenizer {path} is not a whole SentencePiece model; get the file again.") from error
        ids = (self._model.bos_id(), self._model.eos_id())  # below 0: SentencePiece's way to say that there is none
        super().__init__(path, *(token if token >= 0 else None for token in ids))

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return int(self._model.vocab_size())

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def _spelling(self, token: int) -> str:
        return str(self._model.id_to_piece(token))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        _check_ids(ids, self)
        return str(self._model.decode(list(ids)))


class JsonTokenizer(_FileTokenizer):
    """Hugging Face's tokenizer.json. Which tokens are BOS and EOS is said by the files beside it."""

    kind: TokenizerKind = "tokenizers"

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust library raises a bare Exception for a file that it cannot read
            reason = _first_line(error)
            raise TokenizerError(f"tokenizer {path} is not a whole tokenizer.json ({reason}); get the file again.") from error
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError(f"tokenizer {path} has an empty vocabulary; get the file again.")
        self.vocab_size = max(vocabulary.values()) + 1
        super().__init__(path, *(_special_id(path, role, vocabulary) for role in ("bos", "eos")))

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def _spelling(self, token: int) -> str:
        return str(self._model.id_to_token(token))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        _check_ids(ids, self)
        return str(self._model.decode(list(ids), skip_special_tokens=True))


class TiktokenTokenizer(_FileTokenizer):
    """Llama 3's ranks: byte-level BPE, followed by 256 special tokens that the file does not list."""

    kind: TokenizerKind = "tiktoken"

    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = _read_ranks(path)
        self._first_special = len(ranks)
        names = _llama3_special_tokens()
        special = {name: self._first_special + index for index, name in enumerate(names)}
        self._model = tiktoken.Encoding(path.name, pat_str=_LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self._first_special + len(names)
        super().__init__(path, special[_LLAMA3_BOS], special[_LLAMA3_EOS])

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, allowed_special="all"))

    def _spelling(self, token: int) -> str:
        return str(self._model.decode([token]))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        _check_ids(ids, self)
        return str(self._model.decode([token for token in ids if token < self._first_special]))


class StreamDecoder:
    """Turns tokens into text as they come: the pieces joined are what `decode` makes of all tokens at once.

    One character may take several tokens (bytes of UTF-8), and a token's text may depend on the one before it (SentencePiece
    drops the space that starts a text). So a few tokens are kept and decoded again, and text that still ends in half a
    character is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text is out already
        self._pending: list[int] = []  # tokens whose text is not

    def push(self, token: int) -> str:
        """Return the text that is certain now; often empty."""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Return the rest, half characters as U+FFFD; the decoder is then as new."""
        text = self._new_text() if self._pending else ""
        self._context, self._pending = [], []
        return text

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        return decode([*self._context, *self._pending])[len(decode(self._context)) :]


def tokenizer_kind(path: Path) -> TokenizerKind | None:
    """Return which kind of tokenizer a file holds, by its first bytes; None: it is none."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.lstrip()[:1] == b"{":
        return "tokenizers" if b'"added_tokens"' in head or b'"truncation"' in head else None
    if _RANK_LINE.match(head):
        return "tiktoken"
    # protobuf: field 1 (a piece), its length in one or two bytes, and in it field 1 again (the piece's text)
    if head[:1] == b"\x0a" and (head[2:3] == b"\x0a" or (len(head) > 3 and head[1] > 0x7F and head[3] == 0x0A)):
        return "sentencepiece"
    return None


def find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer's file in a folder, by content; None: there is none.

    Raises:
        TokenizerError: two files of the preferred kind (tokenizer.json before tiktoken before SentencePiece) differ.
    """
    found: dict[TokenizerKind, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        kind = tokenizer_kind(path) if path.is_file() and not path.name.startswith(".") else None
        if kind:
            found.setdefault(kind, []).append(path)
    for kind in _PREFERENCE:
        paths = found.get(kind, [])
        if len({sha256_file(path) for path in paths}) > 1:
            names = ", ".join(path.name for path in paths)
            raise TokenizerError(f"folder {folder} holds more than one {kind} tokenizer ({names}); keep the model's own only.")
        if paths:
            return paths[0]
    return None


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from its file, or from the folder that holds it.

    Raises:
        TokenizerError: there is none, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizerError(f"tokenizer {path} does not exist; name a tokenizer file or the folder that holds one.")
    file: Path | None = path
    if path.is_dir():
        file = find_tokenizer(path)
        if file is None:
            raise TokenizerError(f"folder {path} holds no tokenizer; put the model's tokenizer.model or tokenizer.json into it.")
    assert file is not None
    kind = tokenizer_kind(file)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(file)
    if kind == "tokenizers":
        return JsonTokenizer(file)
    if kind == "tiktoken":
        return TiktokenTokenizer(file)
    raise TokenizerError(
        f"{file} is not a tokenizer that llmq knows; allowed are a SentencePiece model, a tokenizer.json and Llama 3's ranks."
    )


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Each library fails in its own way on an id that it does not have; say it in one."""
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise TokenizerError(f"token {token} is not in tokenizer {tokenizer.path}, which has {tokenizer.vocab_size} tokens.")


def _special_id(path: Path, role: Literal["bos", "eos"], vocabulary: dict[str, int]) -> int | None:
    """Return the id of the BOS or EOS token: the first file beside the tokenizer that speaks of it decides."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        data = _read_companion(path.parent / name)
        if f"{role}_token" in data:
            token = data[f"{role}_token"]
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None and text not in vocabulary:
                raise TokenizerError(f"{path.parent / name} says that {role}_token is {text!r}, which {path.name} does not have.")
            return None if text is None else vocabulary[text]
    for name in ("generation_config.json", "config.json"):
        value = _read_companion(path.parent / name).get(f"{role}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    return None


def _read_companion(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file beside the tokenizer; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON ({_first_line(error)}); get the file again.") from error
    return data if isinstance(data, dict) else {}


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return token bytes -> rank of a tiktoken file; the ranks are 0, 1, 2 … without a gap."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"tokenizer {path} is damaged at line {number}: {line[:40]!r} is not 'base64 rank'.") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"tokenizer {path} has {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1}; get it again.")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"tokenizer {path} has no token for byte {missing[0]} ({len(missing)} are missing); get it again.")
    return ranks


def _llama3_special_tokens() -> list[str]:
    """Return Llama 3.1's special tokens in the order of their ids; the unnamed ones are numbered among themselves."""
    numbers = iter(range(_LLAMA3_SPECIAL))
    return [
        _LLAMA3_NAMED[index] if index in _LLAMA3_NAMED else f"<|reserved_special_token_{next(numbers)}|>"
        for index in range(_LLAMA3_SPECIAL)
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
