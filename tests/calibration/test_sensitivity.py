"""Sensitivities, against the whole model run in fp64 with one linear changed, and against the Kronecker product written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.statistics import Statistics
from llmq.calibration.factors import FactorMemory
from llmq.calibration.sensitivity import Question, second_order, sensitivities
from llmq.errors import SchemeError, UsageError
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.registry import resolve

VOCABULARY, WIDTH = 48, 32
INT4, GPTQ, INT8 = resolve("int4", {"group_size": 32}), resolve("int4-gptq", {"group_size": 64}), resolve("int8-weight-only")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 64)
        self.gate = nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH)

    def forward(self, h: Tensor, context: Any) -> Tensor:
        x = self.norm(h)
        return h + self.down(torch.tanh(self.up(x)) * self.gate(x)) * context


class Model(nn.Module):
    """The smallest thing that has blocks, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.7

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens)

    def context(self, h: Tensor) -> float:
        return 0.5

    def head(self, h: Tensor) -> Tensor:
        return self.lm_head(h)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h, self.context(h))
        return self.head(h)


@pytest.fixture
def windows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (14, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return tokens[:10], tokens[10:]


def hessian_by_hand(model: Model, fqn: str, tokens: Tensor) -> Tensor:
    """H = 2/n sum x^T x of a linear's inputs in the original model."""
    rows: list[Tensor] = []
    handle = model.get_submodule(fqn).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        model(tokens.long())
    handle.remove()
    x = torch.cat(rows).double()
    return (2 / len(x) * x.T @ x).float()


def divergence_by_hand(model: Model, fqn: str, changed: Tensor, tokens: Tensor) -> float:
    """Mean KL in fp64, each model run whole."""
    original = copy.deepcopy(model).double()
    other = copy.deepcopy(original)
    other.get_submodule(fqn).weight.data = changed.double()
    with torch.no_grad():
        was, now = original(tokens.long()).log_softmax(-1), other(tokens.long()).log_softmax(-1)
    return float((was.exp() * (was - now)).sum(-1).mean())


def quantized_by_hand(model: Model, fqn: str, candidate: ResolvedScheme, tokens: Tensor) -> Tensor:
    weight = model.get_submodule(fqn).weight.detach()
    statistics = Statistics(hessian_by_hand(model, fqn, tokens)) if candidate.needs_calibration else None
    return candidate.quantize_weight(weight, statistics, fqn)[0].dequantize()


def test_what_is_measured_is_the_divergence_of_the_whole_model(windows: tuple[Tensor, Tensor]) -> None:
    model, (tokens, held_out) = Model(), windows
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = sensitivities(model, tokens, held_out, Question([INT4, GPTQ, INT8]))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [each.fqn for each in found] == linears
    for each in found:
        assert each.shape == tuple(model.get_submodule(each.fqn).weight.shape)
        for candidate, kl in zip((INT4, GPTQ, INT8), each.kl, strict=True):
            if each.shape[1] % 64 and candidate is GPTQ:
                assert kl is None  # 32 inputs cannot be cut into groups of 64
                continue
            changed = quantized_by_hand(model, each.fqn, candidate, tokens)
            exact = divergence_by_hand(model, each.fqn, changed, held_out)
            # an fp32 log-probability is off by some 1e-6, and the divergence is a mean of their differences
            assert kl == pytest.approx(exact, rel=2e-3, abs=2e-7), (each.fqn, candidate.name)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert sensitivities(model, tokens, held_out, Question([INT4, GPTQ, INT8])) == found


def test_second_order_is_half_the_quadratic_form_of_the_kronecker_product() -> None:
    generator = torch.Generator().manual_seed(1)
    for n, k in ((3, 5), (6, 2), (1, 4)):
        e, a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, k), (k, k), (n, n)))
        inputs, outputs = a @ a.T, b @ b.T
        vector = e.reshape(-1)  # rows one after another: H_O (x) H_I
        exact = 0.5 * float(vector @ torch.kron(outputs, inputs) @ vector)
        assert second_order(e.float(), inputs.float(), outputs.float()) == pytest.approx(exact, rel=1e-5)


def factors_of(model: Model) -> tuple[FactorMemory, Mapping[str, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(4)
    memory, known = FactorMemory(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            a, b = (torch.randn(size, size, generator=generator) for size in module.weight.shape[::-1])
            known[name] = (a @ a.T, b @ b.T)
            memory.write(name, *known[name])
    return memory, known


def test_the_fisher_method_needs_no_run(windows: tuple[Tensor, Tensor]) -> None:
    model, (tokens, held_out) = Model(), windows
    memory, known = factors_of(model)
    found = sensitivities(model, tokens, held_out, Question([INT4, GPTQ], "fisher", memory, {"lm_head"}))
    assert [each.fqn for each in found] == list(known)
    for each in found:
        inputs, outputs = (factor.double() for factor in known[each.fqn])
        for candidate, kl in zip((INT4, GPTQ), each.kl, strict=True):
            if kl is None:
                continue
            e = (quantized_by_hand(model, each.fqn, candidate, tokens) - model.get_submodule(each.fqn).weight.detach()).double()
            assert kl == pytest.approx(0.5 * float(torch.trace(outputs @ e @ inputs @ e.T)), rel=1e-4)
    with pytest.raises(SchemeError, match=r"Fisher factors of blocks\.0\.up are needed"):
        sensitivities(model, tokens, held_out, Question([INT4], "fisher", None, {"lm_head"}))


def test_linears_that_are_skipped_are_not_looked_at(windows: tuple[Tensor, Tensor]) -> None:
    model, (tokens, held_out) = Model(), windows
    skip = {"lm_head", "blocks.1.up", "blocks.0.down"}
    found = sensitivities(model, tokens, held_out, Question([INT8], skip=skip))
    assert len(found) == 7
    assert not skip & {each.fqn for each in found}
    assert all(kl is not None and 0 <= kl < math.inf for each in found for kl in each.kl)


def test_questions_that_cannot_be(windows: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UsageError, match="at least one candidate"):
        sensitivities(Model(), *windows, Question([]))
    with pytest.raises(UsageError, match=r"in fp32, got a model in torch\.bfloat16"):
        sensitivities(Model().bfloat16(), *windows, Question([INT4]))
