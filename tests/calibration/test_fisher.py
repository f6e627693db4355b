"""Fisher factors: against every token's gradient in fp64, against the KL itself, and the same however they are computed."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_threads import on_threads
from torch import Tensor, nn

from llmq.algorithms.fisher import (
    FactorSums,
    FisherFactors,
    add_weighted_,
    mirror_,
    sample_labels,
    window_uniforms,
)
from llmq.calibration.fisher import FisherSettings, fisher_factors
from llmq.errors import SchemeError, UsageError
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=40,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    eos_token_ids=(2,),
)
UNIT_ROUNDOFF = 2.0**-24
FP32 = FisherSettings(activations="fp32", gradients="fp32")


@pytest.fixture(scope="module")
def llama() -> Llama:
    model = Llama(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.7)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(CONFIG.vocab_size, (7, 11), generator=torch.Generator().manual_seed(5))


def linears_of(model: Llama) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def collect(model: nn.Module, tokens: Tensor, linears: Any, settings: FisherSettings) -> dict[str, FisherFactors]:
    found: dict[str, FisherFactors] = {}
    fisher_factors(model, tokens, linears, lambda fqn, i, o: found.__setitem__(fqn, FisherFactors(i, o)), settings=settings)
    return found


def naive(model: Llama, tokens: Tensor, fqn: str, *, seed: int, rounds: int) -> FisherFactors:
    """Every token's (g^T g) (x) (x^T x) as it stands in the paper, from one autograd graph of the whole model in fp64."""
    work = copy.deepcopy(model).double()
    linear = work.get_submodule(fqn)
    seen: list[Tensor] = []

    def listen(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        leaf = y.detach().requires_grad_()
        seen.extend((args[0].detach(), leaf))
        return leaf

    handle = linear.register_forward_hook(listen)
    logits = work(tokens)
    handle.remove()
    labels = torch.stack([sample_labels(row.detach(), window_uniforms(seed, i, tokens.shape[1])) for i, row in enumerate(logits)])
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    x, g = seen[0].flatten(0, 1), seen[1].grad.flatten(0, 1)  # type: ignore[union-attr]
    n, k = linear.weight.shape
    fisher = torch.zeros(n, k, n, k, dtype=torch.float64)
    for xi, gi in zip(x, g, strict=True):
        G = torch.outer(gi, xi)
        fisher += torch.einsum("ab,cd->abcd", G, G) / len(x)
    i, o = torch.eye(k, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for _ in range(rounds):
        i, o = (
            torch.einsum("nkml,nm->kl", fisher, o) / o.square().sum(),
            torch.einsum("nkml,kl->nm", fisher, i) / i.square().sum(),
        )
    o = o * n / o.trace()
    i = i * torch.einsum("nknk->", fisher) / n / i.trace()
    return FisherFactors(i, o)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("fqn", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"])
def test_factors_are_those_of_every_tokens_gradient(llama: Llama, tokens: Tensor, fqn: str, rounds: int) -> None:
    """The bound: each product on the way loses at most gamma(d) of its sums of absolute values in fp32, with d the longest
    inner dimension; some 40 products lie between the first input and the last gradient. (3e-7 is what is lost.)"""
    expected = naive(llama, tokens, fqn, seed=3, rounds=rounds)
    got = collect(llama, tokens, [fqn], replace(FP32, seed=3, rounds=rounds))[fqn]
    bound = 40 * CONFIG.vocab_size * UNIT_ROUNDOFF
    assert relative(got.inputs, expected.inputs) < bound
    assert relative(got.outputs, expected.outputs) < bound
    assert torch.equal(got.inputs, got.inputs.t())
    assert torch.equal(got.outputs, got.outputs.t())


def test_factors_have_the_traces_that_are_promised(llama: Llama, tokens: Tensor) -> None:
    for name, found in collect(llama, tokens, linears_of(llama), FP32).items():
        n = found.outputs.shape[0]
        assert found.outputs.trace().item() == pytest.approx(n, rel=1e-5), name
        assert torch.linalg.eigvalsh(found.inputs.double()).min() > -1e-5 * found.inputs.trace(), name


class OneLinear(nn.Module):
    """y = W x, softmax(y): the block is the linear, and the head does nothing."""

    class Block(nn.Module):
        def __init__(self, vocabulary: int, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, vocabulary, bias=False)

        def forward(self, h: Tensor, context: Any) -> Tensor:
            return self.linear(h)

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(3, width)
        self.blocks = nn.ModuleList([self.Block(vocabulary, width)])
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.7, generator=generator)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens)

    def context(self, h: Tensor) -> None:
        return None

    def head(self, h: Tensor) -> Tensor:
        return h


class WidthPreserving(OneLinear):
    """The activations between blocks have one width, so the vocabulary is the width."""

    def __init__(self) -> None:
        super().__init__(6, 6)


def test_quadratic_form_is_the_second_order_of_the_kl() -> None:
    """With one input x, F = x^T x (x) (diag p - p^T p) is a Kronecker product, so nothing but the drawing of labels is
    approximate: relative error of each entry of g^T g over n tokens about 1 / sqrt(n). The third order of the KL adds the size
    of the change, |E x| = 0.01."""
    model = WidthPreserving()
    n = 40_000
    tokens = torch.zeros(n // 100, 100, dtype=torch.int64)
    found = collect(model, tokens, ["blocks.0.linear"], FP32)["blocks.0.linear"]
    weight, x = model.blocks[0].linear.weight.detach().double(), model.tokens.weight[0].detach().double()
    p = (weight @ x).log_softmax(0)
    generator = torch.Generator().manual_seed(8)
    for _ in range(5):
        change = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        change *= 0.01 / (change @ x).norm()
        q = ((weight + change) @ x).log_softmax(0)
        kl = (p.exp() * (p - q)).sum().item()
        form = torch.trace(found.outputs.double() @ change @ found.inputs.double() @ change.t()).item() / 2
        assert form == pytest.approx(kl, rel=5 / math.sqrt(n) + 0.02)


def test_bf16_streams_cost_less_than_the_drawing_of_labels(llama: Llama, tokens: Tensor) -> None:
    names = linears_of(llama)
    exact, other = collect(llama, tokens, names, FP32), collect(llama, tokens, names, replace(FP32, seed=1))
    rough = collect(llama, tokens, names, FisherSettings())
    for name in names:
        assert relative(rough[name].inputs, exact[name].inputs.double()) < 0.02, name
        assert relative(rough[name].inputs, exact[name].inputs.double()) < relative(
            other[name].inputs, exact[name].inputs.double()
        )


@pytest.mark.parametrize("every", [2, 3, 5])
def test_states_that_are_computed_again_are_the_same_bits(llama: Llama, tokens: Tensor, tmp_path: Path, every: int) -> None:
    names = linears_of(llama)
    expected = collect(llama, tokens, names, FisherSettings(rounds=2))
    got = collect(llama, tokens, names, FisherSettings(rounds=2, every=every, spill=tmp_path))
    assert list(got) == list(expected)
    for name in names:
        assert torch.equal(got[name].inputs, expected[name].inputs)
        assert torch.equal(got[name].outputs, expected[name].outputs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_windows_and_get_the_same_factors(llama: Llama, tokens: Tensor, size: int) -> None:
    names = linears_of(llama)[:9]
    whole = collect(llama, tokens, names, replace(FP32, rounds=2))
    found = on_threads(size, lambda ranks: collect(llama, tokens, names, replace(FP32, rounds=2, ranks=ranks)))
    for name in names:
        for one in found:
            assert torch.equal(one[name].inputs, found[0][name].inputs)
            assert torch.equal(one[name].outputs, found[0][name].outputs)
            assert relative(one[name].inputs, whole[name].inputs.double()) < 40 * CONFIG.vocab_size * UNIT_ROUNDOFF
            assert relative(one[name].outputs, whole[name].outputs.double()) < 40 * CONFIG.vocab_size * UNIT_ROUNDOFF


def test_sums_of_tokens_may_be_added() -> None:
    """Sums over two parts of the tokens, added, give what one sum gives."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(30, 5, generator=generator), torch.randn(30, 4, generator=generator)
    before = FisherFactors(torch.eye(5) * 3, torch.eye(4) + 0.1)
    whole, left, right = (FactorSums((4, 5), x, before) for _ in range(3))
    whole.add(x, g)
    left.add(x[:11], g[:11])
    right.add(x[11:], g[11:])
    for mine, its in zip(left.tensors(), right.tensors(), strict=True):
        mine.add_(its)
    together, expected = left.finish(), whole.finish()
    bound = 40 * UNIT_ROUNDOFF * 4  # gamma of 30 sums, weights of 5 terms, and what cancels
    assert relative(together.inputs, expected.inputs.double()) < bound
    assert relative(together.outputs, expected.outputs.double()) < bound


def test_labels_of_a_window_do_not_depend_on_the_others(llama: Llama, tokens: Tensor) -> None:
    assert torch.equal(window_uniforms(4, 9, 5), window_uniforms(4, 9, 7)[:5])
    assert not torch.equal(window_uniforms(4, 9, 5), window_uniforms(4, 8, 5))
    assert not torch.equal(window_uniforms(4, 9, 5), window_uniforms(5, 9, 5))


def test_labels_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.5, -2.0, 0.3, -30.0])
    n = 20_000
    labels = sample_labels(logits.expand(n, -1), torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    p = logits.double().softmax(0)
    counts = torch.bincount(labels, minlength=5).double()
    assert ((counts / n - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    edges = sample_labels(logits.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert edges.tolist() == [0, 4]  # e^-30 is a thousand times the distance of 1 from its neighbour below


@pytest.mark.parametrize("width", [1, 3, 1030])
def test_weighted_sums_are_exact_to_rounding(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(9, width, generator=generator), torch.rand(9, generator=generator)
    total = torch.zeros(width, width)
    add_weighted_(total, rows, weights)
    add_weighted_(total, rows, weights)
    exact = 2 * (rows.double().t() * weights.double()) @ rows.double()
    bound = (2 * 9 + 3) * UNIT_ROUNDOFF * 2 * (rows.double().abs().t() * weights.double()) @ rows.double().abs()
    assert ((mirror_(total).double() - exact).abs() <= bound).all()


def test_a_head_or_unknown_linear_is_refused(llama: Llama, tokens: Tensor) -> None:
    with pytest.raises(UsageError, match=r"lm_head.*vocabulary"):
        collect(llama, tokens, ["lm_head"], FP32)
    with pytest.raises(UsageError, match="at least 1 round"):
        FisherSettings(rounds=0)


def test_gradients_that_are_not_finite_are_refused(tokens: Tensor) -> None:
    model = Llama(CONFIG).requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    with pytest.raises(SchemeError, match="not finite"):
        collect(model, tokens, ["model.layers.1.mlp.down_proj"], FP32)


def test_a_linear_that_does_not_run_is_refused(tokens: Tensor) -> None:
    model = WidthPreserving()
    model.blocks[0].spare = nn.Linear(6, 6)
    with pytest.raises(SchemeError, match="spare did not run"):
        collect(model, torch.zeros(1, 4, dtype=torch.int64), ["blocks.0.spare", "blocks.0.linear"], FP32)
