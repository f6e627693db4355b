"""Leave-one-out figures against copies of the whole model, and errors of linears against the linears run by hand."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmq.algorithms.folding import fold_, fold_pairs
from llmq.evaluation.divergence import evaluate_candidate
from llmq.evaluation.layer_errors import linear_inputs
from llmq.evaluation.leave_one_out import Change, Resumed, leave_one_out
from llmq.evaluation.originals import numbers, originals_of, weight_of
from llmq.evaluation.protocols import Windows
from llmq.evaluation.reference import ReferenceLogits
from llmq.evaluation.scoring import Batching
from llmq.model.llama import Llama
from llmq.ops.select import prepare
from llmq.schemes.apply import quantize_

PROTOCOL = Windows(length=16)
SMALL = Batching(tokens=40, logits_bytes=128 * 4 * 7)
SCHEMES = {"int4": {"group_size": 32}, "int8-weight-only": {}, "int8-dynamic": {}, "int8-dynamic-int4": {"group_size": 32}}


def quantized(model: Llama, scheme: str, dtype: torch.dtype, *, skip: tuple[str, ...] = ()) -> Llama:
    """A copy of the model under a scheme, ready to run."""
    other = copy.deepcopy(model)
    quantize_(other, scheme, skip=skip, dtype=dtype, options=SCHEMES.get(scheme, {}))
    prepare(other)
    return other


def original(model: Llama, dtype: torch.dtype) -> Llama:
    return quantized(model, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], dtype)


def linears_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "scheme", ["int4", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in SCHEMES if scheme != "int4")]
)
def test_one_weight_put_back_gives_what_the_whole_model_with_it_gives(scheme: str, dtype, llama, chars, essay) -> None:
    model, base = quantized(llama, scheme, dtype), original(llama, dtype)
    names = linears_of(model)  # the head too
    originals = originals_of(model, base, names, folded=False)
    with ReferenceLogits(base, chars, essay, PROTOCOL, batching=SMALL) as reference:
        assert len(reference.batches) > 3
        measure = partial(evaluate_candidate, tokenizer=chars, text=essay, protocol=PROTOCOL, reference=reference)
        before = measure(model)
        weights = {name: weight_of(model, name) for name in names}
        found = leave_one_out(
            model, before, {name: each.put_back for name, each in originals.items()}, measure, reference.batches
        )
        assert all(weight_of(model, name) is weights[name] for name in names)
        assert list(found) == names
        for name, change in found.items():
            other = copy.deepcopy(model)
            other.get_submodule(name).weight = weight_of(base, name)
            whole = Change.between(before, measure(other))
            assert torch.equal(change.kl, whole.kl)
            assert torch.equal(change.nll, whole.nll)
            assert float(change.kl.abs().sum()) > 0
        _check_by_hand(before, found[names[0]], (model, base), names[0], reference)


def _check_by_hand(before, change: Change, models: tuple[Llama, Llama], name: str, reference: ReferenceLogits) -> None:
    """The figures of one linear, from logits alone."""
    model, base = models
    other = copy.deepcopy(model)
    other.get_submodule(name).weight = weight_of(base, name)
    kl, nll = [], []
    for window in reference.plan.windows:
        rows = [each(window.inputs[None])[0, -len(window.targets) :].double().log_softmax(-1) for each in (base, model, other)]
        divergences = [(rows[0].exp() * (rows[0] - row)).sum() for row in rows[1:]]
        losses = [-row.gather(1, window.targets[:, None]).sum() for row in rows[1:]]
        kl.append(float(divergences[0] - divergences[1]))
        nll.append(float(losses[0] - losses[1]))
    count = sum(len(window.targets) for window in reference.plan.windows)
    tolerance = 1e-6 if model.dtype == torch.float32 else 3e-3  # bf16 sums differ with the number of rows
    assert change.mean_kl.value == pytest.approx(sum(kl) / count, abs=tolerance)
    assert change.ln_perplexity.value == pytest.approx(sum(nll) / count, abs=10 * tolerance)
    assert change.mean_kl.stderr is not None
    assert before.divergence.kl_mean.value > 0


def test_changes_add_up_and_shrink(chars, essay, llama) -> None:
    one = Change(torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([0.3, 0.1, -0.1]).double(), torch.tensor([4, 4, 2]))
    both = one.plus(one.times(0.5))
    assert both.mean_kl.value == pytest.approx(1.5 * 6 / 10)
    assert both.ln_perplexity.value == pytest.approx(1.5 * 0.3 / 10)
    assert both.mean_kl.stderr == pytest.approx(1.5 * (one.mean_kl.stderr or 0))
    assert one.certain
    assert not one.times(-1).certain
    noisy = Change(torch.tensor([3.0, -2.9]).double(), one.nll[:2], torch.tensor([4, 4]))
    assert not noisy.certain


def test_windows_at_the_start_are_left_out(chars, essay, llama) -> None:
    with ReferenceLogits(llama, chars, essay, PROTOCOL) as every, ReferenceLogits(llama, chars, essay, PROTOCOL, skip=3) as later:
        assert len(later.plan.windows) == len(every.plan.windows) - 3
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(every.plan.windows[3:], later.plan.windows, strict=True))


def folded_copy(model: Llama) -> Llama:
    """The same function with scales folded into every block, and no rounding."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for block in other.blocks:
        for pair in fold_pairs(block):
            fold_(block, pair, torch.rand(pair.channels, generator=generator) * 3 + 0.2)
    return other


def test_folded_scales_are_found_again(llama: Llama) -> None:
    folded = folded_copy(llama)
    model = quantized(folded, "int8-weight-only", torch.float32, skip=("lm_head",))
    names = [name for name in linears_of(model) if name != "lm_head"]
    found = originals_of(model, original(llama, torch.float32), names, folded=True)
    for name in names:
        weight, expected = found[name].weight, folded.get_submodule(name).weight
        # behind a norm the scale is exact; between two linears rounding to 8 bits leaves it uncertain by a hundredth
        exact = name.endswith(("q_proj", "k_proj", "gate_proj"))
        torch.testing.assert_close(weight, expected, rtol=1e-5 if exact else 2e-2, atol=1e-6)
    # with every linear put back, the model is the original again
    tokens = torch.arange(40)[None]
    for name in names:
        model.get_submodule(name).weight = found[name].put_back()
    torch.testing.assert_close(model(tokens), llama(tokens), rtol=0, atol=0.02 * float(llama(tokens).abs().max()))


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic"])
def test_errors_are_those_of_the_linears_outputs(scheme: str, folds: bool, llama: Llama, chars, essay) -> None:
    base = original(llama, torch.float32)
    model = quantized(folded_copy(llama) if folds else llama, scheme, torch.float32)
    names = linears_of(model)
    originals = originals_of(model, base, names, folded=folds)
    with ReferenceLogits(base, chars, essay, PROTOCOL, batching=SMALL) as reference:
        windows, batches = reference.plan.windows, reference.batches
    activation = weight_of(model, names[0]).format.activation
    roundings = [] if activation is None else [(activation, None)]
    inputs = dict(linear_inputs(Resumed(base, batches), None, originals, lambda _: roundings))
    assert list(inputs) == names
    for name in names:
        rows: list[torch.Tensor] = []
        handle = base.get_submodule(name).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for window in windows:
            base(window.inputs[None])
        handle.remove()
        x = torch.cat(rows).double()
        x = x if originals[name].divided is None else x / originals[name].divided
        weight, now = originals[name].weight.double(), numbers(weight_of(model, name)).double()
        y = x @ weight.T
        error = inputs[name].error(weight.float(), now.float(), weight_of(model, name).format)
        assert error.weight == pytest.approx(float((x @ (now - weight).T).square().sum() / y.square().sum()), rel=1e-3)
        if activation is None:
            assert error.inputs == 0
            continue
        steps = x.abs().amax(1, keepdim=True) / 127
        rounded = (x / steps).round() * steps
        # both errors together are what the linear really does
        assert error.total == pytest.approx(float((rounded @ now.T - y).square().sum() / y.square().sum()), rel=1e-3)
        assert 0 < error.total != error.weight
