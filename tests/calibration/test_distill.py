"""Distillation: exact gradients, frozen codes, the best held-out step of what is stored, and never worse than the start."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_threads import on_threads
from torch import Tensor, nn
from torch.func import functional_call

from llmq.algorithms.distillation import TrainedGrid, TrainedVector, divergence
from llmq.calibration.distill import Distilled, DistillSettings, distill
from llmq.calibration.stages import InMemory, block_model
from llmq.calibration.student import Student
from llmq.errors import SchemeError, TextError, UsageError
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor
from llmq.progress import Silent
from llmq.schemes.apply import quantize_

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
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
OPTIONS: dict[str, dict[str, Any]] = {
    "float": {"group_size": 32},
    "int": {"group_size": 32, "zero_point": "int"},
    "symmetric": {"group_size": 32, "symmetric": True},
}


@pytest.fixture(scope="module")
def original() -> Llama:
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
    return torch.randint(CONFIG.vocab_size, (40, 11), generator=torch.Generator().manual_seed(5))


def quantized(original: Llama, kind: str = "float", skip: tuple[str, ...] = ("lm_head",)) -> Llama:
    model = copy.deepcopy(original)
    quantize_(model, "int4", options=OPTIONS[kind], skip=skip)
    return model


def codes_of(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {
        name: module.weight.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and isinstance(module.weight, QuantizedTensor)
        and isinstance(module.weight.format.weight, IntGrid)
    }


def plain(model: Llama, weights: dict[str, QuantizedWeight], norms: dict[str, Tensor]) -> Llama:
    """A model of ordinary tensors with these weights and norms."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            result.get_submodule(name).weight.copy_(weight.dequantize())
        for name, norm in norms.items():
            result.get_parameter(name).copy_(norm)
    return result


def kl(original: nn.Module, model: nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        p, q = (m(tokens).double().log_softmax(-1) for m in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def naive_gradients(original: Llama, model: Llama, tokens: Tensor, temperature: float) -> dict[str, Tensor]:
    """Autograd in fp64 through one graph of the whole model, from masters written out as in the module's formula."""
    reference = copy.deepcopy(original).double()
    masters: dict[str, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    for name, weight in codes_of(model).items():
        assert weight.scale is not None
        s0, (n, k) = weight.scale.double(), weight.shape
        a = masters[f"{name}.a"] = torch.zeros_like(s0, requires_grad=True)
        offset: Any = 8.0 if weight.grid.zero_point == "float" else 0.0  # type: ignore[union-attr]
        if weight.grid.zero_point == "int":  # type: ignore[union-attr]
            assert weight.zero_point is not None
            offset = weight.zero_point.double()[..., None]
        numbers = (weight.codes().double().view(n, s0.shape[1], -1) - offset) * (s0 * (1 + a))[..., None]
        if weight.grid.zero_point == "float":  # type: ignore[union-attr]
            assert weight.zero_point is not None
            b = masters[f"{name}.b"] = torch.zeros_like(s0, requires_grad=True)
            numbers = numbers + (weight.zero_point.double() + s0 * b)[..., None]
        parameters[f"{name}.weight"] = numbers.view(n, k)
    for name, parameter in reference.named_parameters():
        if parameter.ndim == 1:
            c = masters[name] = torch.zeros_like(parameter, requires_grad=True)
            parameters[name] = parameter * (1 + c)
    with torch.no_grad():
        p = (reference(tokens) / temperature).log_softmax(-1)
    q = (functional_call(reference, parameters, (tokens,)) / temperature).log_softmax(-1)
    ((p.exp() * (p - q)).sum() * temperature**2).backward()
    return {name: tensor.grad for name, tensor in masters.items()}  # type: ignore[misc]


def loss_against(original: Llama, tokens: Tensor, temperature: float = 1.0) -> Any:
    with torch.no_grad():
        expected = original(tokens).flatten(0, 1)
    return lambda logits, rows: divergence(logits, expected[rows], temperature)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("skip", [("lm_head",), pytest.param((), marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_graph_in_fp64(original: Llama, tokens: Tensor, kind: str, skip: tuple[str, ...]) -> None:
    """The bound is that of the Fisher factors' test: some 40 products on the way, with inner dimensions of at most 61."""
    model = quantized(original, kind, skip)
    student = Student(block_model(model), InMemory())
    student.backward(tokens[:3], loss_against(original, tokens[:3], 1.5))
    expected = naive_gradients(original, model, tokens[:3], 1.5)
    scales, zeros, norms = student.groups()
    found = [tensor.grad for tensor in (*scales, *zeros, *norms)]
    names = [f"{name}.a" for name in codes_of(model)]
    names += [f"{name}.b" for name in codes_of(model)] if kind == "float" else []
    names += [name for name, parameter in original.named_parameters() if parameter.ndim == 1]
    assert len(names) == len(found) == len(expected)
    for name, gradient in zip(names, found, strict=True):
        assert gradient is not None
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < 40 * CONFIG.vocab_size * UNIT_ROUNDOFF, name


def test_holding_graphs_and_running_blocks_twice_give_the_same_bits(original: Llama, tokens: Tensor) -> None:
    model = quantized(original)
    twice, hold = (Student(block_model(model), InMemory(), hold=hold) for hold in (False, True))
    losses = [student.backward(tokens[:4], loss_against(original, tokens[:4])) for student in (twice, hold)]
    assert losses[0] == losses[1]
    for one, other in zip(twice.masters(), hold.masters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_gradients_add_up(original: Llama, tokens: Tensor) -> None:
    model = quantized(original)
    whole, parts = (Student(block_model(model), InMemory()) for _ in range(2))
    whole.backward(tokens[:6], loss_against(original, tokens[:6]))
    for part in (slice(0, 2), slice(2, 6)):
        parts.backward(tokens[part], loss_against(original, tokens[part]))
    for one, other in zip(whole.masters(), parts.masters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() <= 40 * CONFIG.vocab_size * UNIT_ROUNDOFF * one.grad.norm()


SETTINGS = DistillSettings(epochs=3, batch=5, rate=6e-3, zero_rate=6e-2, held_out=0.25, evaluations=4, hold=True)


@pytest.fixture(scope="module")
def distilled(original: Llama, tokens: Tensor) -> Distilled:
    return distill(quantized(original), original, tokens, settings=SETTINGS)


def test_it_pays_and_the_report_says_what_is_stored(original: Llama, tokens: Tensor, distilled: Distilled) -> None:
    report = distilled.report
    held = tokens[30:]
    start = kl(original, plain(original, codes_of(quantized(original)), {}), held)
    stored = kl(original, plain(original, distilled.weights, distilled.norms), held)
    assert (report.windows, report.held_out, report.steps) == (30, 10, 18)
    assert [look.step for look in report.evaluations] == [0, 4, 9, 14, 18]
    assert report.evaluations[0].held_out_kl == pytest.approx(start, rel=1e-3)
    assert report.evaluations[report.best].held_out_kl == pytest.approx(stored, rel=1e-3)
    assert stored < 0.9 * start


def test_codes_are_frozen_and_scales_are_of_the_stored_dtype(original: Llama, distilled: Distilled) -> None:
    start = codes_of(quantized(original))
    assert distilled.weights.keys() == start.keys()
    for name, weight in distilled.weights.items():
        assert torch.equal(weight.qdata, start[name].qdata)
        assert weight.scale is not None
        assert weight.scale.dtype == torch.bfloat16
        assert not torch.equal(weight.scale, start[name].scale)  # type: ignore[arg-type]
    assert distilled.norms.keys() == {name for name, parameter in original.named_parameters() if parameter.ndim == 1}


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(original: Llama, tokens: Tensor, distilled: Distilled) -> None:
    again = distill(quantized(original), original, tokens, settings=replace(SETTINGS, hold=False))
    assert again.report.to_json() == distilled.report.to_json()
    for name, weight in again.weights.items():
        assert all(torch.equal(a, b) for a, b in zip(weight.tensors, distilled.weights[name].tensors, strict=True))


@pytest.mark.slow
def test_processes_share_windows_and_get_the_same_weights(original: Llama, tokens: Tensor, distilled: Distilled) -> None:
    """Sums in another order are other numbers in their last bits, and rounding to bf16 makes steps of them here and there; so
    what is compared with one process is what it measures."""
    found = on_threads(2, lambda r: distill(quantized(original), original, tokens, settings=replace(SETTINGS, ranks=r)))
    for one in found:
        assert one.report.to_json() == found[0].report.to_json()
        for name, weight in one.weights.items():
            assert all(torch.equal(a, b) for a, b in zip(weight.tensors, found[0].weights[name].tensors, strict=True))
    for mine, its in zip(found[0].report.evaluations, distilled.report.evaluations, strict=True):
        assert mine.step == its.step
        assert mine.held_out_kl == pytest.approx(its.held_out_kl, rel=0.02)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_harmful_run_keeps_the_start(original: Llama, tokens: Tensor) -> None:
    model, notes = quantized(original), Notes()
    result = distill(model, original, tokens, settings=replace(SETTINGS, rate=0.9, epochs=1), progress=notes)
    assert result.report.best == 0
    assert any("stays as it was" in note for note in notes.notes)
    for name, weight in codes_of(model).items():
        assert all(torch.equal(a, b) for a, b in zip(weight.tensors, result.weights[name].tensors, strict=True))
    for name, norm in result.norms.items():
        assert torch.equal(norm, original.get_parameter(name))


def test_models_are_not_changed_and_integer_zero_points_stay(original: Llama, tokens: Tensor) -> None:
    model = quantized(original, "int")
    before = {name: [t.clone() for t in weight.tensors] for name, weight in codes_of(model).items()}
    result = distill(model, original, tokens[:8], settings=replace(SETTINGS, epochs=1, evaluations=1, norms=False))
    assert result.norms == {}
    for name, weight in codes_of(model).items():
        assert all(torch.equal(a, b) for a, b in zip(weight.tensors, before[name], strict=True))
        assert torch.equal(result.weights[name].zero_point, before[name][2])  # type: ignore[arg-type]


def test_divergence_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ps, qs = ([2.718281828459045 ** (v / 3) for v in row] for row in (t, s))
        ps, qs = ([v / sum(row) for v in row] for row in (ps, qs))
        expected += 9 * sum(p * torch.tensor(p / q, dtype=torch.float64).log().item() for p, q in zip(ps, qs, strict=True))
    assert divergence(student, teacher, 3.0).item() == pytest.approx(expected, rel=1e-12)
    assert divergence(teacher, teacher).item() == 0


def test_what_is_stored_is_rounded_once() -> None:
    vector = TrainedVector(torch.tensor([1.0, -0.5], dtype=torch.bfloat16))
    vector.change += torch.tensor([0.5, 1.25])
    assert vector.value().tolist() == [1.5, -1.125]
    assert vector.value().dtype == torch.bfloat16
    grid = IntGrid(4, 32, symmetric=True, scale_dtype="bfloat16")
    weight = QuantizedWeight.from_codes(
        grid,
        torch.randint(-8, 8, (3, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8),
        torch.full((3, 2), -0.5).bfloat16(),
    )
    trained = TrainedGrid(weight)
    trained.scale_change += 0.005  # bf16 has steps of 2^-7 of its size there
    assert trained.apply(weight).scale.float().unique().item() == -0.5 * (1 + 2**-7)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="integer grid"):
        TrainedGrid(QuantizedWeight.from_float(torch.zeros(2, 2)))


def test_what_cannot_be_is_refused(original: Llama, tokens: Tensor) -> None:
    with pytest.raises(TextError, match="1 of 1 calibration windows"):
        distill(quantized(original), original, tokens[:1])
    with pytest.raises(SchemeError, match="nothing to distill"):
        distill(original, original, tokens, settings=DistillSettings(norms=False))
    for wrong in ({"epochs": 0}, {"rate": 0.0}, {"held_out": 1.0}):
        with pytest.raises(UsageError, match=r"distillation"):
            DistillSettings(**wrong)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_is_refused(original: Llama, tokens: Tensor) -> None:
    with pytest.raises(SchemeError, match="not finite at step"):
        distill(quantized(original), original, tokens, settings=replace(SETTINGS, rate=1e30, zero_rate=1e30))
