"""What a model must read and multiply, counted, not measured: the physics that measured times are compared with.

Bytes of one decode step, for B sequences of which each sees `visible` tokens (itself included):

    linears       every nn.Linear's weight as it lies in memory: codes, scales and zero points; the output head too. Once a
                  step, however many sequences. A head tied to the embedding is one such weight, and the table is not
                  counted again. A model that is prepared is counted in its kernels' layouts, padding included: there, codes
                  of 2 and 3 bits take 4. A model that is not there is counted as its formats store it.
    vectors       norm weights and biases
    embedding     one row of the embedding table for each sequence
    kv            keys and values of all visible tokens, for each sequence (a sliding layer reads no more than its window);
                  codes and scales of an int8 cache

Not counted: what is written (one key and one value a sequence and layer), activations, and rotary tables: they are three
orders of magnitude smaller, and live in caches.

FLOPs count a multiplication and an addition as two, of the linears as they are shaped ([N, K]: 2 N K a token, whatever the
packing) and of the two products of attention (4 H D a token and visible token). Norms, rotations and softmax are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.numerics.grid import LinearFormat
from llmq.ops.tensor import QuantizedTensor

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class LinearTraffic:
    """One linear: its name, shape [N, K], and the bytes of its weight where it lies."""

    fqn: str
    n: int
    k: int
    nbytes: int

    @property
    def flops(self) -> int:
        """FLOPs for one row of x."""
        return 2 * self.n * self.k


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one decode step reads, by what they are; see the module's text."""

    linears: int
    vectors: int
    embedding: int
    kv: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.vectors + self.embedding + self.kv


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time that a machine needs, and which of its two walls sets it."""

    seconds: float
    wall: Literal["bandwidth", "compute"]


@dataclass(frozen=True)
class Traffic:
    """What any step of one model reads and multiplies. Made by `traffic_of_model` or `traffic_of_config`."""

    config: LlamaConfig
    linears: tuple[LinearTraffic, ...]
    vectors_nbytes: int
    embedding_row_nbytes: int
    kv_dtype: torch.dtype

    @property
    def linears_nbytes(self) -> int:
        """Bytes that all linears store, the output head included."""
        return sum(linear.nbytes for linear in self.linears)

    def kv_nbytes(self, batch_size: int, visible: int) -> int:
        """Bytes of the keys and values of `visible` tokens of `batch_size` sequences, as one decode step reads them."""
        # of one token, hence tiny; on "meta" its rotation table would take torch a second, to load its compiler
        return KVCache(self.config, batch_size, 1, self.kv_dtype, "cpu").nbytes_read(visible)

    def decode_bytes(self, batch_size: int, visible: int) -> StepBytes:
        """Bytes that one decode step reads, each of `batch_size` sequences seeing `visible` tokens, itself included."""
        return StepBytes(
            linears=self.linears_nbytes,
            vectors=self.vectors_nbytes,
            embedding=batch_size * self.embedding_row_nbytes,
            kv=self.kv_nbytes(batch_size, visible),
        )

    def decode_flops(self, batch_size: int, visible: int) -> int:
        """FLOPs of one decode step of `batch_size` sequences, each of them seeing `visible` tokens, itself included."""
        seen = sum(_seen(self.config.window(layer), visible) for layer in range(self.config.num_layers))
        return batch_size * (sum(linear.flops for linear in self.linears) + self._attention_flops(seen))

    def prefill_bytes(self, batch_size: int, length: int) -> StepBytes:
        """Bytes that a prefill of `batch_size` x `length` tokens has to read: every weight once, one row a token."""
        return StepBytes(
            linears=self.linears_nbytes,
            vectors=self.vectors_nbytes,
            embedding=batch_size * length * self.embedding_row_nbytes,
            kv=0,
        )

    def prefill_flops(self, batch_size: int, length: int) -> int:
        """FLOPs of a prefill of `batch_size` x `length` tokens that computes logits for each sequence's last token only."""
        body = sum(linear.flops for linear in self.linears if linear.fqn != HEAD)
        head = sum(linear.flops for linear in self.linears if linear.fqn == HEAD)
        seen = sum(
            sum(_seen(self.config.window(layer), visible) for visible in range(1, length + 1))
            for layer in range(self.config.num_layers)
        )
        return batch_size * (length * body + head + self._attention_flops(seen))

    def _attention_flops(self, seen: int) -> int:
        """FLOPs of q·k and of weights·v for `seen` pairs of a query and a key that it sees."""
        return 4 * self.config.num_heads * self.config.head_dim * seen


def traffic_of_model(model: Llama, kv_dtype: torch.dtype | None = None) -> Traffic:
    """Count a model that is there, quantized or not, prepared or not; `kv_dtype` is that of its KV cache, None: the model's."""
    linears, vectors, row = [], 0, 0
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears.append(LinearTraffic(fqn, module.out_features, module.in_features, stored_bytes(module.weight)))
            vectors += 0 if module.bias is None else stored_bytes(module.bias)
        elif isinstance(module, nn.Embedding):
            row += module.embedding_dim * module.weight.dtype.itemsize
        else:
            vectors += sum(stored_bytes(parameter) for parameter in module.parameters(recurse=False))
    return Traffic(model.config, tuple(linears), vectors, row, kv_dtype or model.dtype)


def traffic_of_config(
    config: LlamaConfig, formats: Mapping[str, LinearFormat], dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> Traffic:
    """Count a model that is not there.

    Args:
        config: its shape.
        formats: format of each linear that is not stored in `dtype`, by fqn.
        dtype: compute dtype: of norms, biases and embedding, and of linears without a format.
        kv_dtype: of the KV cache; None: `dtype`.

    Raises:
        UsageError: `formats` names a linear that the model does not have.
        ShapeError: a linear does not fit its format.
    """
    shapes = linear_shapes(config)
    strangers = sorted(set(formats) - set(shapes))
    if strangers:
        raise UsageError(f"the model has no linear {strangers[0]!r}; its linears are named like {next(iter(shapes))!r}.")
    linears = tuple(
        LinearTraffic(fqn, n, k, _format_bytes(fqn, n, k, formats[fqn]) if fqn in formats else n * k * dtype.itemsize)
        for fqn, (n, k) in shapes.items()
    )
    vectors = (2 * config.num_layers + 1) * config.hidden_size + _bias_elements(config)
    return Traffic(config, linears, vectors * dtype.itemsize, config.hidden_size * dtype.itemsize, kv_dtype or dtype)


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Return (N, K) of every linear by fqn, in the order of the model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config.num_layers)
    shapes = {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in block.items()}
    return {**shapes, HEAD: (config.vocab_size, hidden)}


def floor(nbytes: int, flops: int, *, bandwidth_gbps: float, peak_gflops: float) -> Floor:
    """Return the least time for reading `nbytes` and computing `flops`, both at once, at these rates (10⁹ a second).

    Raises:
        UsageError: a rate is not positive.
    """
    if bandwidth_gbps <= 0 or peak_gflops <= 0:
        raise UsageError(f"bandwidth and peak must be positive, got {bandwidth_gbps} GB/s and {peak_gflops} GFLOP/s.")
    reading_s, computing_s = nbytes / (bandwidth_gbps * 1e9), flops / (peak_gflops * 1e9)
    return Floor(reading_s, "bandwidth") if reading_s >= computing_s else Floor(computing_s, "compute")


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor where it lies: of a quantized one those of codes, scales and zero points, in the layout that it is in."""
    return tensor.nbytes_stored if isinstance(tensor, QuantizedTensor) else tensor.numel() * tensor.element_size()


def _seen(window: int | None, visible: int) -> int:
    return visible if window is None else min(visible, window)


def _format_bytes(fqn: str, n: int, k: int, form: LinearFormat) -> int:
    form.weight.check(n, k, fqn)
    return form.nbytes(n, k)


def _bias_elements(config: LlamaConfig) -> int:
    """Number of bias elements of all layers."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = q + 2 * kv if config.attention_bias else 0
    output = config.hidden_size if config.attention_output_bias else 0
    mlp = 2 * config.intermediate_size + config.hidden_size if config.mlp_bias else 0
    return config.num_layers * (attention + output + mlp)
