"""Every scheme, and what else computes with a whole model, on a device that is not the CPU: the same bits, and nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated_device import EMULATED, nothing_left
from torch import Tensor, nn

from llmq.algorithms.folding import FoldPair
from llmq.algorithms.smoothquant import SmoothOptions, learned_scale
from llmq.algorithms.statistics import Statistics
from llmq.api.distilling import distill_model
from llmq.calibration.activations import Activations, Spill, brought
from llmq.calibration.distill import DistillSettings, distill
from llmq.calibration.factors import FactorMemory
from llmq.calibration.fisher import FisherSettings, fisher_factors
from llmq.calibration.recorder import CalibrationSet
from llmq.calibration.sensitivity import Question, sensitivities
from llmq.calibration.sequential import WalkSettings, quantize_sequential
from llmq.model.llama import Llama
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantize_
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.registry import resolve, scheme_names

FEW = {"steps": 3, "exponents": 2, "group_size": 32, "alpha_step": 0.5, "smoothing": "alpha"}
LARGER = ("int4", "int4-gptq", "int4-yaqa", "int4-awq", "int4-autoround")
"""Schemes that run with all they can do, and through two blocks: those that share their code run once more, but shorter."""
Build = Callable[..., Llama]


def quickly(name: str) -> ResolvedScheme:
    """Settle a scheme so that it fits the tiny model, and is done soon."""
    known = type(resolve(name).options).model_fields
    wanted = FEW | ({} if name in LARGER else {"sweeps": 0, "search": "range"})
    return resolve(name, {key: value for key, value in wanted.items() if key in known})


def stored(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """What a model stores, by parameter."""
    return {
        name: parameter.weight.tensors if isinstance(parameter, QuantizedTensor) else (parameter.detach(),)
        for name, parameter in model.named_parameters()
    }


def assert_same(here: dict[str, tuple[Tensor, ...]], there: dict[str, tuple[Tensor, ...]]) -> None:
    """The same bits, and those of the second on the device."""
    assert here.keys() == there.keys()
    for name, tensors in here.items():
        for mine, its in zip(tensors, there[name], strict=True):
            assert its.device.type == EMULATED, name
            assert torch.equal(mine, its.cpu()), name


def test_the_device_counts_and_computes() -> None:
    x = torch.randn(3, 4)
    with nothing_left() as memory:
        there = x.to(EMULATED)
        assert memory.live == 48
        assert torch.equal((there.t() @ there + 1).cpu(), x.t() @ x + 1)
        assert torch.equal((there * torch.tensor(2.0)).cpu(), x * 2)
        leaf = there.clone().requires_grad_()
        leaf.sigmoid().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.device == there.device
        del there, leaf


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, there: there + x,
        lambda x, there: x + there,
        lambda x, there: there[torch.tensor([0])],
        lambda x, there: x.add_(there),
        lambda x, there: torch.cat([x, there]),
    ],
)
def test_the_device_is_as_strict_as_a_gpu(mixed: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="on the same device"):
        mixed(x, x.to(EMULATED))
    with pytest.raises(TypeError, match="numpy"):
        x.to(EMULATED).numpy()
    with pytest.raises(AssertionError, match="draw there, and move"):
        torch.rand(2, device=EMULATED)


@pytest.mark.parametrize("name", scheme_names())
def test_every_scheme_walks_to_the_same_bits(name: str, tiny: Build, windows: CalibrationSet) -> None:
    scheme, skip = quickly(name), [] if quickly(name).baseline_dtype else ["lm_head"]
    shape = {} if name in LARGER else {"num_layers": 1, "intermediate_size": 32}
    model = tiny(**shape)
    with nothing_left():
        there = tiny(**shape).to(EMULATED)
        reports = [quantize_sequential(each, scheme, windows, skip=skip)[1] for each in (model, there)]
        assert_same(stored(model), stored(there))
        del there
    assert [report.to_json() for report in reports[0]] == [report.to_json() for report in reports[1]]


@pytest.mark.parametrize("name", ["int4", "int8-dynamic-int4", "int8-dynamic", "int3-gptq"])
def test_a_module_is_quantized_where_it_is(name: str, tiny: Build) -> None:
    scheme = quickly(name)
    generator = torch.Generator().manual_seed(1)
    hessians = {}
    for fqn, module in tiny().named_modules():
        if isinstance(module, nn.Linear):
            x = torch.randn(40, module.in_features, generator=generator)
            hessians[fqn] = x.t() @ x / 20
    both = []
    with nothing_left():
        for device in ("cpu", EMULATED):
            model = tiny().to(device)
            known = {fqn: Statistics(h.to(device), torch.zeros_like(h, device=device)) for fqn, h in hessians.items()}
            quantize_(model, scheme, dtype=torch.bfloat16, statistics=known)
            both.append(model)
        assert_same(*map(stored, both))
        both.clear()
        del model, known


@pytest.mark.parametrize(("name", "where"), [("int4-autoround", "host"), ("int3-yaqa", "disk"), ("int4-awq", "host")])
def test_hidden_states_may_lie_elsewhere(
    name: str, where: str, tiny: Build, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.calibration.activations.BATCH_TOKENS", 36)
    spill: Spill = "host" if where == "host" else tmp_path
    model, there = tiny(num_layers=1), tiny(num_layers=1).to(EMULATED)
    quantize_sequential(model, quickly(name), windows, skip=["lm_head"])
    quantize_sequential(there, quickly(name), windows, skip=["lm_head"], settings=WalkSettings(spill=spill))
    assert_same(stored(model), stored(there))
    states = Activations((9, 12, 8), torch.bfloat16, spill=spill, device=torch.device(EMULATED))
    assert states.states.device.type == states.like(spill=spill).states.device.type == "cpu"
    assert brought(states.batches[0], states.device).device.type == states.windows(torch.tensor([1])).device.type == EMULATED


def test_scales_are_learned_on_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 16, generator=generator) ** 3, torch.randn(8, 16, generator=generator)
    pair, options = FoldPair("norm", ("linear",), 16, norm=True), SmoothOptions(iterations=3, rows=20)
    found = [
        learned_scale(x.to(d), [weight.to(d)], pair, torch.ones(16, device=d), options, torch.ones(50, device=d))
        for d in ("cpu", EMULATED)
    ]
    assert torch.equal(found[0], found[1].cpu())
    assert found[0].std() > 0


@pytest.mark.parametrize("method", ["measured", "fisher"])
def test_sensitivities_are_the_same(method: str, tiny: Build, windows: CalibrationSet) -> None:
    found = []
    with nothing_left():
        for device in ("cpu", EMULATED):
            model, factors = tiny(torch.float32, num_layers=1).to(device), FactorMemory()
            names = {name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}
            candidates = (quickly("int3"), quickly("int3-gptq" if method == "measured" else "int3-yaqa"))
            question = Question(candidates, method, factors, {"lm_head"})  # type: ignore[arg-type]
            if question.needs_factors:
                fisher_factors(model, windows.tokens, names, factors.write, settings=FisherSettings(rounds=2))
            found.append(sensitivities(model, windows.tokens[:6], windows.tokens[6:], question))
        del model, factors, question
    assert found[0] == found[1]


@pytest.mark.parametrize("hold", [False, True])
def test_distillation_is_the_same(hold: bool, tiny: Build, windows: CalibrationSet) -> None:
    both, told = [], []
    with nothing_left():
        for device in ("cpu", EMULATED):
            model, original = tiny().to(device), tiny().to(device)
            quantize_(model, resolve("int4", {"group_size": 32, "search": "range"}), skip=["lm_head"])
            told.append(distill_model(model, original, windows.tokens, DistillSettings(epochs=1, batch=4, hold=hold)))
            both.append(model)
        assert_same(*map(stored, both))
        both.clear()
        del model, original
    assert told[0] == told[1]
    assert told[0]["best"] > 0


def test_a_distilled_model_leaves_the_device_weight_by_weight(tiny: Build, windows: CalibrationSet) -> None:
    model, original = tiny(num_layers=1).to(EMULATED), tiny(num_layers=1).to(EMULATED)
    quantize_(model, resolve("int4", {"group_size": 32, "search": "range"}), skip=["lm_head"])
    found = distill(model, original, windows.tokens, settings=DistillSettings(epochs=1, evaluations=1))
    tensors = [tensor for weight in found.weights.values() for tensor in weight.tensors]
    assert {tensor.device.type for tensor in [*tensors, *found.norms.values()]} == {"cpu"}
