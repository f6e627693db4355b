"""QuaRot's rotations that cost nothing at run time (Ashkboos et al., arXiv:2404.00456, section 4), folded into weights.

An orthogonal matrix in front of a linear map and its inverse behind the map before it change no function, but spread what is
large in a few channels over all of them, and weights and inputs without outliers are easier to round. A Llama has two places:

    R1 [hidden, hidden]   the residual stream h becomes h R1. RMSNorm without its weight commutes with rotations, so every norm's
                          weight is multiplied into the linears behind it first, and becomes 1.
    R2 [D, D]             the values of every head, between v_proj and o_proj; attention mixes positions, never channels.

A linear that reads the residual stream becomes W diag(norm) R1, one that writes it R1^T W. Nothing here knows of a model: the
functions say what each parameter becomes, so that a walk can apply them part by part. They compute in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmq.errors import SchemeError, ShapeError

_READS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITES = ("self_attn.o_proj", "mlp.down_proj")
_VALUE, _OUTPUT = "self_attn.v_proj", "self_attn.o_proj"


@dataclass(frozen=True)
class Rotation:
    """Random rotations of a model; the same numbers for the same seed.

    Attributes:
        hidden_size: width of the residual stream.
        head_dim: width of a head, D.
        seed: of all draws.
        residual: whether there is an R1.
        heads: whether there are R2s, one for each block.
    """

    hidden_size: int
    head_dim: int
    seed: int = 0
    residual: bool = True
    heads: bool = True

    @cached_property
    def r1(self) -> Tensor | None:
        """R1 [hidden, hidden], fp64."""
        return random_rotation(self.hidden_size, torch.Generator().manual_seed(self.seed)) if self.residual else None

    def r2(self, layer: int) -> Tensor | None:
        """R2 [D, D] of a block, fp64."""
        return random_rotation(self.head_dim, torch.Generator().manual_seed(self.seed + 1 + layer)) if self.heads else None


def rotate_block(parameters: Mapping[str, Tensor], rotation: Rotation, layer: int) -> dict[str, Tensor]:
    """Return what the parameters of a block become.

    Args:
        parameters: all of a block's, by their names in it, floating point; not changed.
        rotation: see `Rotation`.
        layer: the block's index.

    Returns:
        All parameters, by the same names, in fp64 where they changed; norms are 1 where there is an R1.

    Raises:
        SchemeError: the block does not have the linears of a Llama.
        ShapeError: the rotation is of another model's width.
    """
    result = dict(parameters)
    needed = [f"{name}.weight" for names in (*_READS.values(), _WRITES, tuple(_READS)) for name in names]
    missing = [name for name in needed if name not in parameters]
    if missing:
        raise SchemeError(
            f"rotations are for blocks with the module names of Llama, and {', '.join(missing)} is missing; leave them out."
        )
    r1, r2 = rotation.r1, rotation.r2(layer)
    if r1 is not None:
        for norm, readers in _READS.items():
            gamma = parameters[f"{norm}.weight"].double()
            _check(gamma, rotation.hidden_size, norm)
            result[f"{norm}.weight"] = torch.ones_like(gamma)
            for name in readers:
                result[f"{name}.weight"] = (parameters[f"{name}.weight"].double() * gamma) @ r1.to(gamma.device)
        for name in _WRITES:
            result[f"{name}.weight"] = r1.T.to(parameters[f"{name}.weight"].device) @ parameters[f"{name}.weight"].double()
            if f"{name}.bias" in parameters:
                result[f"{name}.bias"] = parameters[f"{name}.bias"].double() @ r1.to(parameters[f"{name}.bias"].device)
    if r2 is not None:
        value, output = result[f"{_VALUE}.weight"].double(), result[f"{_OUTPUT}.weight"].double()
        head = r2.to(value.device)
        if value.shape[0] % len(head) or output.shape[1] % len(head):
            raise ShapeError(
                f"{_VALUE} has {value.shape[0]} outputs, which are no whole heads of {len(head)}; the model is broken."
            )
        rows = value.reshape(-1, len(head), value.shape[1])
        result[f"{_VALUE}.weight"] = (head.T @ rows).reshape(value.shape)
        result[f"{_OUTPUT}.weight"] = (output.reshape(len(output), -1, len(head)) @ head).reshape(output.shape)
        if f"{_VALUE}.bias" in parameters:
            bias = parameters[f"{_VALUE}.bias"].double()
            result[f"{_VALUE}.bias"] = (bias.reshape(-1, len(head)) @ head).reshape(bias.shape)
    return result


def rotate_embedding(weight: Tensor, rotation: Rotation, *, tied: bool) -> Tensor:
    """Return what the embedding [vocabulary, hidden] becomes: fp64, or itself without an R1.

    Raises:
        SchemeError: the head shares the embedding (`tied`), and the final norm's weight goes into one of them only.
    """
    if rotation.r1 is None:
        return weight
    if tied:
        raise SchemeError(
            "the head shares the embedding's weights, and a rotation changes each in its own way; untie them, or do not rotate."
        )
    _check(weight[0], rotation.hidden_size, "the embedding")
    return weight.double() @ rotation.r1.to(weight.device)


def rotate_head(norm: Tensor, weight: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Return what the final norm's weight [hidden] and the head's [vocabulary, hidden] become: fp64, or themselves without R1."""
    if rotation.r1 is None:
        return norm, weight
    _check(norm, rotation.hidden_size, "the final norm")
    return torch.ones_like(norm, dtype=torch.float64), (weight.double() * norm.double()) @ rotation.r1.to(weight.device)


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix [size, size], fp64: D H / sqrt(size), with random signs D.

    H is a Hadamard matrix where one is known: Sylvester's of a power of 2, times Paley's of the smallest order that leaves such
    a power. Where none is, H is Sylvester's of the largest power of 2 in `size`, times a random orthogonal matrix.
    """
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    order = next(
        (order for order in range(1, size + 1) if _leaves_power(size, order) and hadamard_kernel(order) is not None), None
    )
    if order is None:
        order = size
        while order % 2 == 0:
            order //= 2
        gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
        kernel, triangle = torch.linalg.qr(gaussian)
        kernel = (
            kernel * torch.sign(triangle.diagonal()) * order**0.5
        )  # uniform over the orthogonal group (Mezzadri, math-ph/0609050)
    else:
        found = hadamard_kernel(order)
        assert found is not None
        kernel = found
    matrix = kernel
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotation: Tensor = signs * matrix / size**0.5
    return rotation


def hadamard_kernel(order: int) -> Tensor | None:
    """Return a Hadamard matrix of this order by Paley's constructions over a prime field, fp64, or None where they give none.

    Orders are 1, q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a prime q = 1 mod 4 (Paley 1933).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, skew=True)
    half = order // 2
    if order % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(_conference(half - 1, skew=False), plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    return None


def _conference(q: int, *, skew: bool) -> Tensor:
    """Return [[0, 1], [±1, Q]] with Q_ij = the Legendre symbol of i - j modulo q."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64)
    symbol[[i * i % q for i in range(1, q)]] = 1
    symbol[0] = 0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if skew else 1
    matrix[1:, 1:] = symbol[(index[:, None] - index) % q]
    return matrix


def _leaves_power(size: int, order: int) -> bool:
    rest = size // order
    return size % order == 0 and rest & (rest - 1) == 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _check(vector: Tensor, size: int, what: str) -> None:
    if vector.shape[-1] != size:
        raise ShapeError(f"{what} has {vector.shape[-1]} channels, and the rotation is of {size}; make one for this model.")
