"""What a file is, by its first bytes and never by its name."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from llmq.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Longest safetensors header: the limit of the format's own library."""

LLAMA2C_MAGIC = 0x616B3432  # "ak42"
LLAMA2C_HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len

_HEAD_BYTES = 4096
_MAX_JSON_BYTES = 32 << 20
_TORCH_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # a pickled 0x1950a86a20f9469cfc6c
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


class Kind(Enum):
    """What a file's first bytes say it is; the value is how a message calls it."""

    SAFETENSORS = "a safetensors file"
    TORCH_ZIP = "a torch zip file"
    TORCH_LEGACY = "a torch file of the old form (before torch 1.6)"
    PICKLE = "a bare Python pickle"
    LLAMA2C = "a llama2.c file"
    JSON = "a JSON file"
    GGUF = "a GGUF file"
    LFS_POINTER = "a Git LFS pointer, not the file itself"
    EMPTY = "an empty file"
    OTHER = "no weights that llmq knows"


def sniff(path: Path) -> Kind:
    """Return what `path` is, by its first bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    if not head:
        return Kind.EMPTY
    for start, kind in (
        (b"PK\x03\x04", Kind.TORCH_ZIP),
        (_TORCH_LEGACY_MAGIC, Kind.TORCH_LEGACY),
        (b"GGUF", Kind.GGUF),
        (b"version https://git-lfs", Kind.LFS_POINTER),
        (LLAMA2C_MAGIC.to_bytes(4, "little"), Kind.LLAMA2C),
    ):
        if head.startswith(start):
            return kind
    if _PICKLE.match(head):
        return Kind.PICKLE
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        return Kind.SAFETENSORS
    if head.lstrip()[:1] == b"{":
        return Kind.JSON
    return Kind.LLAMA2C if _is_llama2c_header(head) else Kind.OTHER


def _is_llama2c_header(head: bytes) -> bool:
    """llama2.c's first form has no magic: seven integers that make the shape of a model are taken for it."""
    if len(head) < LLAMA2C_HEADER.size:
        return False
    numbers: tuple[int, ...] = LLAMA2C_HEADER.unpack_from(head)
    dim, hidden, layers, heads, kv_heads, vocab, length = numbers
    sizes = 0 < dim <= 1 << 16 and 0 < hidden <= 1 << 20 and 0 < layers <= 1 << 10 and 0 < abs(vocab) <= 1 << 22
    counts = 0 < heads <= 1 << 10 and 0 < kv_heads <= heads and 0 < length <= 1 << 24
    return sizes and counts and dim % (2 * heads) == 0 and heads % kv_heads == 0


@dataclass(frozen=True)
class Folder:
    """The files of one folder (not of folders in it), and what they are. For a single file: that file and its folder."""

    path: Path
    only: Path | None = None

    @cached_property
    def kinds(self) -> dict[Path, Kind]:
        """Every file that is not hidden, in the order of the names."""
        try:
            paths = sorted(path for path in self.path.iterdir() if path.is_file() and not path.name.startswith("."))
        except OSError as error:
            raise CheckpointError(f"cannot read folder {self.path}: {error.strerror or error}.") from error
        return {path: sniff(path) for path in paths}

    def weights(self, *kinds: Kind) -> list[Path]:
        """Files of one of these kinds; when a single file was asked for, it alone."""
        return [path for path, kind in self.kinds.items() if kind in kinds and self.only in (None, path)]

    @cached_property
    def objects(self) -> dict[Path, dict[str, Any]]:
        """Every JSON file that holds an object; tokenizers and files beyond 32 MB are left out, damaged files too."""
        return {path: data for path, data in self._parsed.items() if data is not None}

    @property
    def damaged(self) -> list[Path]:
        """JSON files that do not parse."""
        return [path for path, data in self._parsed.items() if data is None]

    @cached_property
    def _parsed(self) -> dict[Path, dict[str, Any] | None]:
        paths = [path for path, kind in self.kinds.items() if kind is Kind.JSON and path.stat().st_size <= _MAX_JSON_BYTES]
        return {path: _parse(path) for path in paths}

    def configs(self, *keys: str) -> list[Path]:
        """JSON objects that have all of `keys`."""
        return [path for path, data in self.objects.items() if all(key in data for key in keys)]


def _parse(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        return None
    assert isinstance(data, dict)  # its first character is a brace
    return data
