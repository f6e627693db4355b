"""KVCache: the keys and values of every token so far, in memory that is allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.rope import inverse_frequencies, rotation_table


class KVCache:
    """Keys and values of all layers for `batch_size` sequences of at most `max_length` tokens.

    The cache does not know how much of it is filled: each call of the model says where it writes (`start`), and reads no
    further than what it has just written. Sequences of a batch are therefore equally long. The rotary tables of all
    positions live here too, because they are needed exactly where a cache is.

    Attributes:
        keys: one tensor [B, H_kv, max_length, D] a layer; already rotated.
        values: one tensor [B, H_kv, max_length, D] a layer.
        cosines: float32 [max_length, 1, D].
        sines: float32 [max_length, 1, D]; see `rope.rotation_table`.

    Raises:
        UsageError: `max_length` is beyond the model's context, or a size is not positive.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise UsageError(f"a KV cache needs a positive batch size and length, got {batch_size} and {max_length}.")
        check_context(max_length, config)
        self.config = config
        self.batch_size = batch_size
        self.max_length = max_length
        self.dtype = dtype
        # zeros, not empty: a masked position still meets its value in 0 * value, which NaN would survive
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        positions = torch.arange(max_length, device=device)
        self.cosines, self.sines = rotation_table(inverse_frequencies(config).to(device), positions)

    def write(self, layer: int, keys: Tensor, values: Tensor, where: slice | Tensor) -> None:
        """Store keys and values [B, H_kv, T, D] of one layer at the positions `where`: a slice, or int64 [T]."""
        if isinstance(where, slice):
            self.keys[layer][:, :, where] = keys
            self.values[layer][:, :, where] = values
        else:
            self.keys[layer].index_copy_(2, where, keys.to(self.dtype))
            self.values[layer].index_copy_(2, where, values.to(self.dtype))

    def reset(self) -> None:
        """Forget everything. Only a cache that may hold NaN needs it: what lies beyond `start` is never read."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def nbytes_read(self, context: int) -> int:
        """Return the bytes of keys and values that one decode step reads when `context` tokens are visible to it.

        A sliding layer reads no more than its window. The whole batch is counted.
        """
        per_token = 2 * self.batch_size * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize
        windows = (self.config.window(layer) for layer in range(self.config.num_layers))
        return per_token * sum(context if window is None else min(context, window) for window in windows)


def check_context(length: int, config: LlamaConfig) -> None:
    """Raise UsageError when `length` tokens are more than the model's context."""
    if length > config.max_position_embeddings:
        raise UsageError(
            f"{length} tokens are beyond the model's context of {config.max_position_embeddings} tokens "
            f"(max_position_embeddings); ask for at most {config.max_position_embeddings}."
        )
