"""Folding scales changes the weights and not the function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.folding import FoldPair, column_amax, divide_stored, fold_, fold_pairs, folded_scales
from llmq.errors import SchemeError, ShapeError

BIASED = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


def scales(pair: FoldPair, seed: int) -> Tensor:
    """Scales over four orders of magnitude."""
    return torch.exp(2 * torch.randn(pair.channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("changes", [{}, BIASED, {"num_kv_heads": 6}], ids=["grouped", "biases", "not grouped"])
def test_block_computes_the_same(tiny_llama: Callable[..., Any], block_work: Callable[..., Any], changes: dict[str, Any]) -> None:
    work = block_work(tiny_llama(**changes), layer=1)
    pairs = fold_pairs(work.module)
    assert [(pair.producer, pair.consumers) for pair in pairs] == [
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    ]
    for seed, pair in enumerate(pairs):
        before = {name: parameter.clone() for name, parameter in work.module.named_parameters()}
        folded = fold_(work.module, pair, scales(pair, seed))
        changed = {
            name.rpartition(".")[0] for name, old in before.items() if not torch.equal(old, work.module.get_parameter(name))
        }
        assert changed == {pair.producer, *pair.consumers}
        assert (folded / scales(pair, seed) - 1).abs().max() < 2**-7
        for h, y in zip(work.inputs, work.targets, strict=True):
            torch.testing.assert_close(work.run(h), y, rtol=1e-11, atol=1e-11)


def test_what_is_stored_in_16_bits_stays_so(tiny_llama: Callable[..., Any]) -> None:
    block = tiny_llama(**BIASED).blocks[0]
    for seed, pair in enumerate(fold_pairs(block)):
        fold_(block, pair, scales(pair, seed))
    vectors = [parameter for name, parameter in block.named_parameters() if parameter.dim() == 1 and "norm" in name]
    vectors += [block.self_attn.v_proj.bias, block.mlp.up_proj.bias]
    for vector in vectors:
        assert torch.equal(vector, vector.to(torch.bfloat16).double())


def test_grouped_channels_against_loops(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    pair = fold_pairs(model.blocks[0])[1]
    heads, kv_heads, width = 6, 2, 8
    values = torch.arange(float(pair.channels))
    expected = [values[(head // (heads // kv_heads)) * width + d] for head in range(heads) for d in range(width)]
    assert pair.expand(values).tolist() == [float(value) for value in expected]
    wide = torch.randn(heads * width, generator=torch.Generator().manual_seed(0))
    for c in range(pair.channels):
        mine = [wide[k] for k in range(heads * width) if pair.expand(values)[k] == c]
        assert pair.gather(wide)[:, c].tolist() == [float(value) for value in mine]
    o = model.blocks[0].self_attn.o_proj.weight.float()
    amax = [o[:, pair.expand(values) == c].abs().max() for c in range(pair.channels)]
    assert torch.equal(column_amax(model.blocks[0], pair), torch.stack(amax))


def test_divide_stored_is_exact_or_leaves_alone() -> None:
    vector = torch.tensor([3.0, -0.7, 0.0, 1e-30, 1e30, 2.0])
    scale = torch.tensor([0.3, 7.0, 5.0, 1e20, 1e-20, 1.0])
    folded, exact = divide_stored(vector, scale)
    assert torch.equal(folded, folded.to(torch.bfloat16).float()) or folded[3] == vector[3]
    assert exact[2] == 5
    assert (folded[2], folded[3], folded[4]) == (0, vector[3], vector[4])
    assert (exact[3], exact[4]) == (1, 1)
    torch.testing.assert_close(folded.double() * exact, vector.double(), rtol=1e-15, atol=0)


def test_only_weights_that_are_quantized_take_scales(tiny_llama: Callable[..., Any]) -> None:
    block = tiny_llama().blocks[0]
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}

    def producers(without: str) -> list[str]:
        return [pair.producer for pair in fold_pairs(block, names - {without})]

    assert producers("self_attn.k_proj") == ["self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
    assert producers("self_attn.v_proj") == ["post_attention_layernorm", "mlp.up_proj"]
    assert producers("mlp.down_proj") == ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm"]


def test_head_has_a_pair_only_when_it_is_quantized(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    (pair,) = fold_pairs(model, {"lm_head"})
    assert (pair.producer, pair.consumers, pair.norm) == ("model.norm", ("lm_head",), True)
    tokens = torch.arange(20).reshape(2, 10)
    before = model(tokens)
    fold_(model, pair, scales(pair, 0))
    torch.testing.assert_close(model(tokens), before, rtol=1e-11, atol=1e-11)


def test_refusals(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(SchemeError, match=r"Linear has no input_layernorm.*without folding"):
        fold_pairs(nn.Linear(4, 4))
    with pytest.raises(SchemeError, match="no norm before lm_head"):
        fold_pairs(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), {"lm_head"})
    block = tiny_llama().blocks[0]
    pair = fold_pairs(block)[0]
    with pytest.raises(ShapeError, match=r"48 channels .* got \[47\]"):
        fold_(block, pair, torch.ones(47))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SchemeError, match="positive and finite"):
            fold_(block, pair, torch.full((48,), bad))
    block.self_attn.o_proj = nn.Linear(47, 48)
    with pytest.raises(SchemeError, match="whole heads of 8"):
        fold_pairs(block)
    block.self_attn.o_proj = nn.Identity()
    with pytest.raises(SchemeError, match="is no linear"):
        fold_pairs(block)


def test_folded_scales_are_read_from_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(12, 20, generator=generator)
    before[2, 5] = before[7] = 0  # a zero tells nothing, and a row of zeros was not divided by anything
    columns, rows = torch.rand(20, generator=generator) + 0.2, torch.rand(12, generator=generator) + 0.2
    after = before * columns / rows[:, None]
    found_columns, found_rows = folded_scales(before, after)
    torch.testing.assert_close(before * found_columns / found_rows[:, None], after)
    live = [row for row in range(12) if row != 7]
    ratio = (found_columns / columns)[0]
    torch.testing.assert_close(found_columns, columns * ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_rows[live], rows[live] * ratio, rtol=1e-5, atol=0)
    assert all(torch.equal(found, torch.ones(len(found))) for found in folded_scales(before, before))
