"""Correction of upstream error: aim at the outputs of the original model, not at those of the original weight.

A linear whose inputs x_q come from quantized blocks should still give what the original model gives there, W x_f. Over all
real weights, sum |W x_f - W' x_q|^2 is least for

    W' = W (sum x_f x_q^T) (sum x_q x_q^T)^-1 = W + W D H^-1,      D = 2/n sum (x_f - x_q) x_q^T,   H = 2/n sum x_q x_q^T,

and for any other weight it is that minimum plus tr((W' - W_hat) H (W' - W_hat)^T) (up to the factor of 2/n), so that rounding
W' instead of W is all there is to do. Qronos (Zhang et al., arXiv:2505.11695) and GPTAQ (Li et al., arXiv:2504.02692)
interleave the same correction with rounding. The difference x_f - x_q is known from a sample, so a part `strength` of it is
taken, and H is damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.algorithms.gptq import Factor
from llmq.algorithms.products import product
from llmq.errors import ShapeError, UsageError


def corrected_target(weight: Tensor, factor: Factor, upstream: Tensor, strength: float) -> Tensor:
    """Return W + strength W D H^-1.

    Args:
        weight: W [N, K], floating point.
        factor: of H [K, K], damped; see `gptq.factorise`.
        upstream: D [K, K], rows by x_f - x_q and columns by x_q: `Statistics.upstream`.
        strength: how much of the correction is taken, from 0 to 1.

    Returns:
        [N, K] in the wider dtype of weight and factor; the weight itself where the correction is not finite.

    Raises:
        ShapeError: shapes do not belong together.
        UsageError: strength is not from 0 to 1.
    """
    k = weight.shape[1]
    if len(factor.order) != k or tuple(upstream.shape) != (k, k):
        raise ShapeError(
            f"a weight of {k} inputs needs a Hessian and upstream statistics [{k}, {k}], got a factor of {len(factor.order)} and "
            f"{list(upstream.shape)}."
        )
    if not 0 <= strength <= 1:
        raise UsageError(f"strength of the correction must be from 0 to 1, got {strength}.")
    upper = factor.unit_upper
    dtype = torch.promote_types(weight.dtype, upper.dtype)
    weight, upper = weight.to(dtype), upper.to(dtype)
    # (W D) (U diag(pivots) U^T)^-1, in the order of the factor
    moved = product(weight, upstream.to(dtype)).index_select(1, factor.order)
    moved = torch.linalg.solve_triangular(upper.t(), moved, upper=False, left=False, unitriangular=True)
    moved /= factor.pivots.to(dtype)
    moved = torch.linalg.solve_triangular(upper, moved, upper=True, left=False, unitriangular=True)
    result = weight.clone()
    result[:, factor.order] += strength * moved
    return result if bool(torch.isfinite(result).all()) else weight
