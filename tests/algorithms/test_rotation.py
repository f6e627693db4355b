"""Rotations: orthogonal, of every size, and a rotated model computes the same function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmq.algorithms.rotation import Rotation, hadamard_kernel, random_rotation, rotate_block, rotate_embedding, rotate_head
from llmq.errors import SchemeError, ShapeError

BIASED = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


def rotate(model: Any, rotation: Rotation) -> None:
    """Rotate a whole model in place."""
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(rotate_embedding(model.model.embed_tokens.weight, rotation, tied=False))
        for layer, block in enumerate(model.blocks):
            for name, value in rotate_block(dict(block.named_parameters()), rotation, layer).items():
                block.get_parameter(name).copy_(value)
        norm, head = rotate_head(model.model.norm.weight, model.lm_head.weight, rotation)
        model.model.norm.weight.copy_(norm)
        model.lm_head.weight.copy_(head)


@pytest.mark.parametrize("kind", [(True, True), (True, False), (False, True)], ids=["R1 and R2", "R1", "R2"])
@pytest.mark.parametrize("changes", [{}, BIASED, {"hidden_size": 46}], ids=["grouped", "biases", "no Hadamard"])
def test_model_computes_the_same(tiny_llama: Callable[..., Any], changes: dict[str, Any], kind: tuple[bool, bool]) -> None:
    model = tiny_llama(rms_norm_eps=1e-5, **changes)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    before = model(tokens).detach()
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rotate(model, Rotation(model.config.hidden_size, 8, 3, residual=kind[0], heads=kind[1]))
    torch.testing.assert_close(model(tokens), before, rtol=1e-10, atol=1e-10)
    changed = {name for name, parameter in model.named_parameters() if not torch.allclose(plain[name], parameter)}
    assert ("model.embed_tokens.weight" in changed) == kind[0]
    assert ("model.layers.1.mlp.gate_proj.weight" in changed) == kind[0]
    assert "model.layers.0.self_attn.v_proj.weight" in changed
    if kind[0]:
        assert all(bool((parameter == 1).all()) for name, parameter in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 20, 24, 28, 43, 46, 48, 64, 96, 172, 256])
def test_rotations_are_orthogonal(size: int) -> None:
    matrix = random_rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    other = random_rotation(size, torch.Generator().manual_seed(1))
    assert size == 1 or not torch.equal(matrix, other)
    assert torch.equal(matrix, random_rotation(size, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("size", [2, 8, 12, 20, 24, 28, 48, 72, 96, 256, 5 * 2**6])
def test_entries_are_equally_large_where_a_hadamard_matrix_is_known(size: int) -> None:
    matrix = random_rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 32, 36, 44, 60, 76])
def test_kernels_are_hadamard_matrices(order: int) -> None:
    kernel = hadamard_kernel(order)
    assert kernel is not None
    assert set(kernel.flatten().tolist()) == {1.0, -1.0}
    assert torch.equal(kernel @ kernel.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_without_a_construction() -> None:
    assert [order for order in range(1, 30) if hadamard_kernel(order) is None] == [
        *(2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 16, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29)
    ]


def test_refusals(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    rotation = Rotation(48, 8)
    with pytest.raises(SchemeError, match="untie them"):
        rotate_embedding(model.model.embed_tokens.weight, rotation, tied=True)
    parameters = dict(model.blocks[0].named_parameters())
    with pytest.raises(ShapeError, match="48 channels, and the rotation is of 64"):
        rotate_block(parameters, Rotation(64, 8), 0)
    with pytest.raises(ShapeError, match="no whole heads of 7"):
        rotate_block(parameters, Rotation(48, 7), 0)
    del parameters["mlp.up_proj.weight"]
    with pytest.raises(SchemeError, match=r"mlp.up_proj.weight is missing"):
        rotate_block(parameters, rotation, 0)
