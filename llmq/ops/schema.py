"""What a kernel is, what it is asked, and the one torch operator through which quantized weights are multiplied.

A `Kernel` is a stateless value. `select` keeps an ordered table of them and asks each one whether it `supports` a `Case`;
`prepare` lays a weight out for the chosen kernel with `prepack`; `unpack` gives the canonical weight back, bit for bit.
`linear` receives a matrix, so kernels never meet other ranks.

Every kernel computes the same thing, up to the rounding of fp32 sums (`reference` is the definition):

    weight-only          y = sum_k x * w                              summed in fp32, rounded once to x's dtype
    int8 activations     y = sum_g ws[n, g] * xs[m] * sum_k (xq - xz) * (wq - wz)      inner sums exact integers
                         (static: xs is the weight's input_scale for all rows, and xz 0)
    float8 activations   y = ws[n] * xs[m] * sum_k xq * wq             products exact in fp32, summed in fp32

plus the bias, added in fp32 before the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight

CANONICAL = "canonical"
"""Name of the layout that is on disk: the tensors of `QuantizedWeight.tensors`, whatever the kernel."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a kernel would have to compute: `[M, K] x [N, K]` of one format, dtype and device; M is not part of it."""

    format: LinearFormat
    n: int
    k: int
    dtype: torch.dtype
    """Dtype of the activations and of the result."""
    device: str
    """Device type: 'cpu', 'cuda', 'meta'."""


@dataclass(frozen=True, slots=True)
class Support:
    """Yes, or no with the reason: a clause that reads after 'kernel X cannot run: '."""

    ok: bool
    reason: str = ""


SUPPORTED = Support(ok=True)


def unsupported(reason: str) -> Support:
    """Return 'no' with its reason."""
    return Support(ok=False, reason=reason)


class Kernel(Protocol):
    """One way to multiply by a quantized weight."""

    @property
    def name(self) -> str:
        """Name in `llmq kernels`, in records and for `prefer`."""
        ...

    @property
    def layout(self) -> str:
        """Name of the layout it reads; kernels of one layout can share a weight. `CANONICAL` needs no prepacking."""
        ...

    @property
    def formats(self) -> str:
        """One line for `llmq kernels`: the formats and dtypes it takes."""
        ...

    @property
    def min_rows(self) -> int:
        """Fewest rows of x it is worth using for. It is correct for any number."""
        ...

    @property
    def max_rows(self) -> int | None:
        """Most rows of x it is worth using for (None: no limit). It is correct for any number."""
        ...

    def available(self) -> Support:
        """Whether this machine and this torch can run it at all."""
        ...

    def supports(self, case: Case) -> Support:
        """Whether it can compute `case` here; implies `available`."""
        ...

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """Return the weight's tensors in the kernel's layout (one to four of them)."""
        ...

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """Inverse of `prepack`, bit for bit."""
        ...

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """Return x W^T + bias.

        Args:
            x: [M, K] of `case.dtype`, any strides and alignment, M may be 0.
            tensors: what `prepack` returned.
            bias: [N] of `case.dtype`, or None.
            case: what `supports` said yes to.

        Returns:
            [M, N] of `case.dtype`.
        """
        ...


def canonical_weight(tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
    """Inverse of `QuantizedWeight.tensors`: what `unpack` is for kernels that read the canonical layout.

    Raises:
        UsageError: when there are not as many tensors as the format has, or one is of another dtype.
        ShapeError: when one is of another shape.
    """
    form = case.format
    zero = isinstance(form.weight, IntGrid) and form.weight.zero_point != "none"
    present = [True, form.quantized, zero, form.has_input_scale]
    if len(tensors) != sum(present):
        raise UsageError(f"a weight of {form} is stored as {sum(present)} tensors, got {len(tensors)}.")
    left = iter(tensors)
    qdata, scale, zero_point, input_scale = (next(left) if there else None for there in present)
    assert qdata is not None
    return QuantizedWeight(form.weight, (case.n, case.k), qdata, scale, zero_point, input_scale)


class CanonicalLayout:
    """The layout half of a kernel that reads the canonical tensors in place. A base class, with nothing else in it."""

    layout = CANONICAL

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`."""
        return weight.tensors

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`."""
        return canonical_weight(tensors, case)
