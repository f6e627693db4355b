"""H = 2/n sum x^T x of a linear's inputs: accumulated in fp32, once for all linears that read the same tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import SchemeError

PANEL = 256
"""Rows of H that one matrix product brings up to date. H is symmetric: of each panel only what is right of its diagonal."""


class Hessian:
    """The running sum; it is made on the device of the first inputs."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` [..., K]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.sum is None:
            self.sum = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        for start in range(0, flat.shape[1], PANEL):
            stop = min(start + PANEL, flat.shape[1])
            self.sum[start:stop, start:].addmm_(flat[:, start:stop].t(), flat[:, start:])
        self.rows += flat.shape[0]

    def value(self) -> Tensor:
        """Return H = 2/n sum x^T x, fp32 [K, K], and start anew; raises SchemeError before the first row."""
        if self.sum is None or self.rows == 0:
            raise SchemeError("a linear was never called during calibration, so nothing is known of its inputs; skip it.")
        h = self.sum
        for start in range(0, len(h), PANEL):  # the lower triangle from the upper one, without a copy of it
            own = slice(start, min(start + PANEL, len(h)))
            upper = h[own, own].triu()
            h[own, own] = upper + upper.triu(1).t()
            h[own.stop :, own] = h[own, own.stop :].t()
        h *= 2 / self.rows
        self.sum, self.rows = None, 0
        return h


@contextmanager
def inputs_of(linears: Mapping[str, nn.Linear], listener: Any) -> Iterator[None]:
    """Call `listener(fqn, x)` with the input of each linear, before it runs."""

    def tell(fqn: str) -> Any:
        return lambda _, args: listener(fqn, args[0])

    handles = [linear.register_forward_pre_hook(tell(fqn)) for fqn, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LinearGroups:
    """Which linears read the same input tensor, found by watching one call: q, k and v of an attention, gate and up of an MLP.

    Two linears are of one group when the very same tensor object reaches both. The inputs are held while the call runs, so
    that no object's identity is used twice.
    """

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._inputs: list[Tensor] = []

    def see(self, fqn: str, x: Tensor) -> None:
        """Take note that `fqn` reads `x`."""
        for group, tensor in zip(self.groups, self._inputs, strict=True):
            if tensor is x:
                group.append(fqn)
                return
        self.groups.append([fqn])
        self._inputs.append(x)

    def forget_inputs(self) -> None:
        """Let go of the tensors, when the call is over."""
        self._inputs = []
