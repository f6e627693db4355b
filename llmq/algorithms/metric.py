"""The quadratic form under which a weight is rounded: tr(H_O E H_I E^T) of the error E = target - W_hat [N, K].

`inputs` is H_I [K, K]: the Hessian of the inputs, or the input factor of the Fisher information. `outputs` is H_O [N, N], or
None for the identity, under which rows do not know of each other. Both come damped: so much is added to their diagonals that
what the calibration text did not see is held near the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms.products import narrowed, product
from llmq.errors import ShapeError

PANEL = 512
"""Columns of a product with H_I that are formed at a time."""


@dataclass(frozen=True, slots=True)
class Metric:
    """tr(H_O E H_I E^T).

    Attributes:
        inputs: H_I [K, K], symmetric, positive definite.
        outputs: H_O [N, N], symmetric, positive definite; None: the identity.
    """

    inputs: Tensor
    outputs: Tensor | None = None

    def check(self, n: int, k: int) -> None:
        """Raise ShapeError when a weight [n, k] does not fit."""
        if tuple(self.inputs.shape) != (k, k):
            raise ShapeError(f"a weight of {k} inputs needs a Hessian [{k}, {k}], got {list(self.inputs.shape)}.")
        if self.outputs is not None and tuple(self.outputs.shape) != (n, n):
            raise ShapeError(f"a weight of {n} outputs needs an output factor [{n}, {n}], got {list(self.outputs.shape)}.")

    def gradient(self, error: Tensor) -> Tensor:
        """Return H_O E H_I [N, K], half the gradient at `error` [N, K]."""
        product = error @ self.inputs.to(error.dtype)
        return product if self.outputs is None else self.outputs.to(error.dtype) @ product

    def row_losses(self, error: Tensor) -> Tensor:
        """Return what each row of `error` [N, K] adds to the loss, fp64 [N]; without H_O that is the row's own loss."""
        if self.outputs is not None:
            return (self.gradient(error).double() * error.double()).sum(1)
        # H_I is symmetric: what is left of its diagonal counts twice, and half of the product is saved
        k = error.shape[1]
        inputs, narrow = self.inputs.to(error.dtype), narrowed(error, k)
        losses = torch.zeros(len(error), dtype=torch.float64, device=error.device)
        for start in range(0, k, PANEL):
            own = slice(start, start + PANEL)
            panel = narrowed(inputs[: own.stop, own], k)
            found = product(narrow[:, :start], panel[:start]).mul_(2).add_(product(narrow[:, own], panel[start:]))
            losses += found.mul_(error[:, own]).sum(1, dtype=torch.float64)
        return losses

    def loss(self, error: Tensor) -> float:
        """Return the loss of `error` [N, K]."""
        return self.row_losses(error).sum().item()


def damped(matrix: Tensor, fraction: float) -> Tensor:
    """Return a copy of a second moment [K, K] with `fraction` of its mean diagonal added to its diagonal.

    Where the diagonal is zero, nothing was ever seen, and the mean itself is added: then nothing but the weight counts there. The
    mean is that over the other entries, and 1 where there are none.
    """
    diagonal = torch.diagonal(matrix)
    live = diagonal != 0
    mean = diagonal[live].double().mean().item() if bool(live.any()) else 1.0
    result = matrix.clone()
    result.diagonal().add_(torch.where(live, fraction * mean, mean).to(matrix.dtype))
    return result
