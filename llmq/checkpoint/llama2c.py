"""llama2.c's files (karpathy/llama2.c, export.py): a header of integers, then fp32 matrices in a fixed order.

    first form      7 x int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, ±vocab_size, seq_len), then the weights;
                    vocab_size > 0: embedding and head are one. Two tables of RoPE cosines and sines precede the head
    version 1       "ak42", int32 1, the 7 integers, uint8 "embedding and head are one", zeros up to byte 256, the weights
    version 2       the same with int8 groups: refused, its numbers are quantized already

q and k are in interleaved RoPE order, as in Meta's code. llama2.c fixes the norm's epsilon and, when it runs, the RoPE base.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.sniff import LLAMA2C_HEADER, LLAMA2C_MAGIC
from llmq.checkpoint.source import TensorInfo
from llmq.errors import CheckpointError
from llmq.model.config import LlamaConfig

NORM_EPS = 1e-5
ROPE_THETA = 10000.0
_VERSION1_HEADER_BYTES = 256
_COSINES, _SINES = "rope.cosines", "rope.sines"
_MAX_ANGLE_ERROR = 1e-4


@dataclass(frozen=True, slots=True)
class Header:
    """What a llama2.c file says of its model."""

    version: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    length: int
    tied: bool
    nbytes: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every stored array in the order of the file: a parameter's name in Meta's spelling, and its shape."""
        dim, hidden, kv_dim = self.dim, self.hidden_dim, self.kv_heads * self.head_dim
        parts: dict[str, tuple[int, ...]] = {
            "attention_norm": (dim,),
            "attention.wq": (dim, dim),
            "attention.wk": (kv_dim, dim),
            "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, dim),
            "ffn_norm": (dim,),
            "feed_forward.w1": (hidden, dim),
            "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim),
        }
        embedding, norm = ("tok_embeddings.weight", (self.vocab_size, dim)), ("norm.weight", (dim,))
        order = list(parts)
        if self.version == 1:
            order = ["attention_norm", "ffn_norm"]
        else:
            yield embedding
        yield from self._layers(order, parts)
        yield norm
        if self.version == 1:
            yield embedding
            yield from self._layers([part for part in parts if part not in order], parts)
        else:
            table = (self.length, self.head_dim // 2)
            yield from ((_COSINES, table), (_SINES, table))
        if not self.tied:
            yield "output.weight", (self.vocab_size, dim)

    def _layers(self, order: list[str], parts: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in order:
            yield from ((f"layers.{layer}.{part}.weight", parts[part]) for layer in range(self.layers))


class Llama2cFile:
    """One llama2.c file; its tensors have Meta's names.

    Raises:
        CheckpointError: the file is truncated or too long, is of an int8 version, or its header cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._mapping: mmap.mmap | None = None
        self._offsets: dict[str, int] = {}
        entries: dict[str, TensorInfo] = {}
        size, position = path.stat().st_size, self.header.nbytes
        for name, shape in self.header.shapes():
            entries[name] = TensorInfo.of(shape, torch.float32, path)
            self._offsets[name] = position
            position += entries[name].nbytes
            if position > size:
                raise CheckpointError(
                    f"{path} is truncated: tensor {name} ends at byte {position}, the file at {size}; get the file again."
                )
        if position != size:
            raise CheckpointError(
                f"{path} has {size - position} bytes more than a llama2.c file with its header would; it is damaged, or of a "
                "kind that llmq does not know."
            )
        self.rope_theta = self._rope_theta()
        self.entries: Mapping[str, TensorInfo] = {name: info for name, info in entries.items() if name not in (_COSINES, _SINES)}

    def read(self, name: str) -> Tensor:
        """See `WeightFile.read`."""
        return self._array(name, self.entries[name].shape)

    def release(self) -> None:
        """See `WeightFile.release`."""
        self._mapping = None

    def _array(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self._mapping is None:
            with self.path.open("rb") as file:
                # copy-on-write, so that torch sees memory it may write to; nobody does, and the file could not change
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._mapping, dtype=torch.float32, count=math.prod(shape), offset=self._offsets[name]).view(
            shape
        )

    def _rope_theta(self) -> float:
        """Return the RoPE base. The first form stores the angles; one that does not belong to a round base is refused.

        The angle of pair i at position p is p * theta ** (-2i / D), so pair 1 at position 1 gives theta.
        """
        head_dim, pairs = self.header.head_dim, self.header.head_dim // 2
        if _COSINES not in self._offsets or self.header.length < 2 or pairs < 2:
            return ROPE_THETA
        table = (self.header.length, pairs)
        cosines, sines = self._array(_COSINES, table)[1].double(), self._array(_SINES, table)[1].double()
        self.release()
        if not cosines.any() and not sines.any():
            return ROPE_THETA  # some writers leave the tables empty, because llama2.c itself skips them
        angles = torch.atan2(sines, cosines)
        theta = float(f"{float(angles[1]) ** (-head_dim / 2):.3g}") if angles[1] > 0 else ROPE_THETA
        expected = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        if not (angles - expected).abs().max() < _MAX_ANGLE_ERROR:
            raise CheckpointError(f"the RoPE tables in {self.path} are not those of any base; the file is damaged.")
        return theta

    def config(self) -> LlamaConfig:
        """Return the model's shape. The file does not name BOS and EOS: the tokenizer does."""
        header = self.header
        return LlamaConfig(
            vocab_size=header.vocab_size,
            hidden_size=header.dim,
            intermediate_size=header.hidden_dim,
            num_layers=header.layers,
            num_heads=header.heads,
            num_kv_heads=header.kv_heads,
            head_dim=header.head_dim,
            max_position_embeddings=header.length,
            rms_norm_eps=NORM_EPS,
            rope_theta=self.rope_theta,
            tie_word_embeddings=header.tied,
        )


def read_header(path: Path) -> Header:
    """Read either form's header."""
    with path.open("rb") as file:
        head = file.read(_VERSION1_HEADER_BYTES)
    start = 0
    version = 0
    if int.from_bytes(head[:4], "little") == LLAMA2C_MAGIC:
        if len(head) < _VERSION1_HEADER_BYTES:
            raise CheckpointError(f"{path} is truncated: a header has {_VERSION1_HEADER_BYTES} bytes, the file {len(head)}.")
        (version,), start = struct.unpack_from("<i", head, 4), 8
        if version == 2:
            raise CheckpointError(
                f"{path} is llama2.c's version 2, quantized to int8 already; export version 0 or 1 (fp32) instead."
            )
        if version != 1:
            raise CheckpointError(f"{path} is llama2.c's version {version}; allowed are the first form and version 1 (fp32).")
    dim, hidden, layers, heads, kv_heads, vocab, length = LLAMA2C_HEADER.unpack_from(head, start)
    if min(dim, hidden, layers, heads, kv_heads, length) < 1 or not vocab or dim % (2 * heads) or heads % kv_heads:
        raise CheckpointError(
            f"the header of {path} is damaged: dim {dim}, hidden {hidden}, layers {layers}, heads {heads}, key-value heads "
            f"{kv_heads}, vocabulary {vocab} and length {length} make no model."
        )
    tied = bool(head[start + LLAMA2C_HEADER.size]) if version else vocab > 0
    nbytes = _VERSION1_HEADER_BYTES if version else LLAMA2C_HEADER.size
    return Header(version, dim, hidden, layers, heads, kv_heads, abs(vocab), length, tied, nbytes)
