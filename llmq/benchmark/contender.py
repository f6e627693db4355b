"""A kernel with a weight in its layout, ready to be timed on weights that come from memory and not from a cache.

In a decode step a whole model lies between two uses of a weight. So each call takes the next of several copies, which together
are several times larger than the last-level cache: the CPU's, or the L2 cache of the GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.benchmark.timing import Call
from llmq.ops.schema import Case, Kernel
from llmq.results.environment import last_level_cache_bytes

_CACHES = 4
"""Copies of a weight amount to this many last-level caches, so that no copy is still cached when its turn comes again."""
_MOST_COPIES = 256


@dataclass(frozen=True)
class Contender:
    """A kernel that can compute the case, and its weight in its layout."""

    kernel: Kernel
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def copies(self) -> int:
        """How many copies of the weight do not fit into the caches of where it is."""
        device = self.tensors[0].device
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else last_level_cache_bytes()
        return min(_MOST_COPIES, 1 + _CACHES * (cache or 0) // self.nbytes)

    def call(self, x: Tensor, case: Case) -> Call:
        """Return a call that multiplies x with the next of the copies."""
        cold = [tuple(tensor.clone() for tensor in self.tensors) for _ in range(self.copies - 1)]
        turns = itertools.cycle([self.tensors, *cold])
        return lambda: self.kernel.linear(x, next(turns), None, case)
