"""Checkpoint: what a checkpoint on disk holds, known without reading a weight, and how each tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from llmq.checkpoint.manifest import Manifest
from llmq.errors import CheckpointError
from llmq.files import sha256_files
from llmq.model.config import LlamaConfig
from llmq.numerics.weight import torch_dtype

Format = Literal["hf", "meta", "gpt-fast", "llama2c", "llmq"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it. `nbytes` counts `shape` in `dtype`; `file` is the first that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    file: Path

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, file: Path) -> TensorInfo:
        """Count the bytes."""
        return TensorInfo(shape, dtype, _product(shape) * dtype.itemsize, file)


class WeightFile(Protocol):
    """One file of weights: its tensors are known at once, and mapped into memory when they are first read."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def entries(self) -> Mapping[str, TensorInfo]:
        """Its tensors, by the names in the file."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor that shares memory with the mapped file; nothing may be written into it."""
        ...

    def release(self) -> None:
        """Let go of the mapping; tensors that were read keep it alive for as long as they live themselves."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor, or some of its rows."""

    file: WeightFile
    name: str
    rows: tuple[int, int] | None = None

    @property
    def info(self) -> TensorInfo:
        """Of these rows."""
        info = self.file.entries[self.name]
        if self.rows is None:
            return info
        return TensorInfo.of((self.rows[1] - self.rows[0], *info.shape[1:]), info.dtype, info.file)

    def read(self) -> Tensor:
        """A view of the mapped file."""
        tensor = self.file.read(self.name)
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """How a parameter comes from what is stored.

    Attributes:
        pieces: what is stored; more than one is joined along `join`, in this order.
        join: the dimension; None: all pieces are one tensor stored several times, and the first is taken.
        heads: the number of heads whose rows are in interleaved RoPE order and become half-split; None: rows stay.
    """

    pieces: tuple[Piece, ...]
    join: int | None = None
    heads: int | None = None

    @staticmethod
    def stored(file: WeightFile, name: str) -> TensorSource:
        """A tensor that is stored as it is used."""
        return TensorSource((Piece(file, name),))

    @property
    def info(self) -> TensorInfo:
        """Of the parameter."""
        first = self.pieces[0].info
        if self.join is None:
            return first
        shape = list(first.shape)
        shape[self.join] = sum(piece.info.shape[self.join] for piece in self.pieces)
        return TensorInfo.of(tuple(shape), first.dtype, first.file)

    @property
    def copied(self) -> bool:
        """Whether `read` makes a copy, because the parameter is not stored as it is used."""
        return len(self.pieces) > 1 or self.heads is not None

    def read(self) -> Tensor:
        """Return the parameter: a view of the mapped file where it is stored as it is used, a copy otherwise."""
        if self.join is None:
            tensor = self.pieces[0].read()
            # a view of what several files hold would keep one of them mapped for the sake of a few bytes
            tensor = tensor.clone() if len(self.pieces) > 1 else tensor
        else:
            tensor = torch.cat([piece.read() for piece in self.pieces], dim=self.join)
        return half_split(tensor, self.heads) if self.heads else tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Opening one reads headers only.

    Attributes:
        path: the folder or file that was asked for.
        format: how it is stored.
        config: the model's shape.
        tensors: the stored tensors by parameter name, in the model's order. An artefact's quantized weights have
            `.qdata`, `.scale` and `.zero_point` after the parameter's name.
        files: the files of weights.
        sources: how each tensor is read; has all of `tensors`, and a head that a tied checkpoint stores all the same.
        manifest: what llmq's own artefact says of itself; None for every other format.
        notes: what the user should know: what was assumed, and what was left out.
    """

    path: Path
    format: Format
    config: LlamaConfig
    tensors: Mapping[str, TensorInfo]
    files: list[Path]
    sources: Mapping[str, TensorSource] = field(repr=False)
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that holds the weights, the configuration and the tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the files of weights: the file's own for one, of the files' hashes in the order of names for more."""
        return sha256_files(self.files)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the stored floating-point bytes are in: what the model is loaded as by default."""
        if self.manifest is not None:
            assert self.manifest.dtype is not None  # parse_manifest
            return torch_dtype(self.manifest.dtype)
        nbytes: dict[torch.dtype, int] = {}
        for info in self.tensors.values():
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=lambda dtype: nbytes[dtype])

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in `tensors`; see `TensorSource.read`."""
        return self.sources[name].read()

    def release(self) -> None:
        """Let go of the mapped files; see `WeightFile.release`."""
        for file in {id(piece.file): piece.file for source in self.sources.values() for piece in source.pieces}.values():
            file.release()

    def with_notes(self, *notes: str) -> Checkpoint:
        """Return it with more notes."""
        return replace(self, notes=(*self.notes, *notes))


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of a q or k projection [N, K] in half-split RoPE order, from interleaved order.

    Meta's code turns the neighbours (2i, 2i + 1) of a head, Hugging Face's and llmq's the pairs (i, i + D/2).
    """
    n, k = weight.shape
    return weight.view(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)


def known_dtypes() -> Mapping[str, torch.dtype]:
    """Return the dtypes of safetensors by the names in its headers."""
    return MappingProxyType(
        {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
            "I64": torch.int64,
            "I32": torch.int32,
            "I16": torch.int16,
            "I8": torch.int8,
            "U8": torch.uint8,
            "BOOL": torch.bool,
        }
    )


def refuse_quantized(name: str, info: TensorInfo) -> None:
    """Raise CheckpointError when a weight is not stored in a floating dtype that llmq computes in."""
    if info.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"tensor {name} in {info.file} is {str(info.dtype).removeprefix('torch.')}: the checkpoint was quantized by another "
            "tool; llmq takes the original (fp32, bf16 or fp16)."
        )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
