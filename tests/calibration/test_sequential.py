"""The walk through the blocks: right Hessians, right groups, right inputs, and it pays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms import products
from llmq.algorithms.rounding import round_linear
from llmq.algorithms.statistics import Statistics
from llmq.calibration.hessian import Hessian, LinearGroups, inputs_of
from llmq.calibration.recorder import CalibrationInfo, CalibrationSet
from llmq.calibration.sequential import WalkSettings, quantize_sequential
from llmq.errors import SchemeError, TextError, UsageError
from llmq.numerics.grid import FloatGrid, IntGrid
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantize_
from llmq.schemes.registry import resolve

VOCABULARY, WIDTH = 64, 32


class Block(nn.Module):
    """Two linears of one input, and one of another; names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 64)
        self.other = nn.Linear(WIDTH, 64, bias=False)
        self.last = nn.Linear(64, WIDTH)

    def forward(self, h: Tensor, context: Any) -> Tensor:
        x = self.norm(h)
        return h + self.last(torch.relu(self.first(x)) * self.other(x)) * context


class Model(nn.Module):
    """The smallest thing that has what the walk needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

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


def windows(n: int = 20, length: int = 16, seed: int = 0) -> CalibrationSet:
    tokens = torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return CalibrationSet(tokens, CalibrationInfo("text", "t", "a", "b", n, length, seed, False, 1, n * length))


SCHEME = resolve("int4-gptq", {"group_size": 32, "correction": 0})


def test_hessian_is_two_over_n_times_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.calibration.hessian.PANEL", 7)
    x = torch.randn(50, 20, dtype=torch.float64)
    hessian = Hessian()
    hessian.add(x[:30].reshape(3, 10, 20).float())
    hessian.add(x[30:].bfloat16())
    exact = torch.cat([x[:30].float().double(), x[30:].bfloat16().double()])
    value = hessian.value()
    torch.testing.assert_close(value.double(), 2 / 50 * exact.T @ exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(value, value.T)
    with pytest.raises(SchemeError, match="never called"):
        hessian.value()


def test_groups_are_found_by_the_tensor_that_is_read() -> None:
    block = Block()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    groups = LinearGroups()
    with inputs_of(linears, groups.see):
        block(torch.randn(1, 4, WIDTH), 1.0)
    assert groups.groups == [["first", "other"], ["last"]]
    block(torch.randn(1, 4, WIDTH), 1.0)  # the hooks are gone
    assert groups.groups == [["first", "other"], ["last"]]


def test_each_block_is_calibrated_on_what_the_quantized_ones_before_it_make() -> None:
    """Redo the walk by hand: one block at a time, all Hessians of a block from one pass."""
    model, calibration = Model(), windows()
    exact = WalkSettings(activations="fp32")
    reports = quantize_sequential(model, SCHEME, calibration, skip=["lm_head"], settings=exact)[1]
    by_hand = Model()
    grid = SCHEME.format.weight
    assert isinstance(grid, IntGrid)
    with torch.no_grad():
        h = by_hand.embed(calibration.tokens.long())
        for index, block in enumerate(by_hand.blocks):
            seen: dict[str, Tensor] = {}
            linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            with inputs_of(linears, seen.__setitem__):
                block(h, 0.5)
            for name, linear in linears.items():
                x = seen[name].reshape(-1, linear.in_features)
                known = Statistics(2 / len(x) * x.T @ x)
                quantized, expected = round_linear(linear.weight, known, grid, SCHEME.options.rounding())
                linear.weight = nn.Parameter(quantized.dequantize())
                mine = model.blocks[index].get_submodule(name).weight
                assert (mine.weight.codes() != quantized.codes()).float().mean() < 0.02  # sums in another order
                report = next(report for report in reports if report.fqn == f"blocks.{index}.{name}")
                assert report.loss == pytest.approx(expected.loss, rel=0.1)
                assert report.rtn_loss == pytest.approx(expected.rtn_loss, rel=0.02)
                assert report.loss <= report.rtn_loss
            h = block(h, 0.5)
    assert [report.fqn for report in reports][:3] == ["blocks.0.first", "blocks.0.other", "blocks.0.last"]
    assert len(reports) == 6


def test_coverage_and_what_is_left_alone() -> None:
    model = Model().bfloat16()
    coverage, reports = quantize_sequential(model, SCHEME, windows(), skip=["lm_head", "blocks.1.*"])
    rows = {row.fqn: row for row in coverage.rows}
    assert rows["lm_head"].reason == rows["blocks.1.last"].reason == "skipped as asked"
    assert rows["blocks.0.last"].target == "int4 g32 float zero"
    assert rows["blocks.0.last"].sqnr_db == reports[2].sqnr_db
    assert len(reports) == 3
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    assert isinstance(model.lm_head.weight.format.weight, FloatGrid)
    assert model.blocks[0].last.weight.dtype == model.blocks[0].norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.bfloat16


def test_the_head_can_be_quantized_too() -> None:
    model = Model().bfloat16()
    _, reports = quantize_sequential(model, SCHEME, windows())
    assert reports[-1].fqn == "lm_head"
    assert reports[-1].loss is not None
    assert isinstance(model.lm_head.weight.format.weight, IntGrid)


def test_a_scheme_without_statistics_gives_what_quantize_gives() -> None:
    model, other = Model(), Model()
    scheme = resolve("int4", {"group_size": 32})
    coverage, reports = quantize_sequential(model, scheme, windows(2), skip=["lm_head"])
    assert coverage == quantize_(other, scheme, skip=["lm_head"])
    assert all(report.loss is None for report in reports)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        if isinstance(mine, QuantizedTensor):
            assert torch.equal(mine.weight.qdata, its.weight.qdata)


def test_same_seed_same_codes() -> None:
    first, second = Model(), Model()
    quantize_sequential(first, SCHEME, windows(4), skip=["lm_head"])
    quantize_sequential(second, SCHEME, windows(4), skip=["lm_head"])
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert torch.equal(a.last.weight.weight.qdata, b.last.weight.weight.qdata)


class Listener:
    """Counts steps and keeps notes."""

    def __init__(self) -> None:
        self.total, self.steps, self.notes = 0, 0, list[str]()

    def task(self, description: str, total: int) -> Any:
        from contextlib import nullcontext

        self.total += total

        def advance(steps: int) -> None:
            self.steps += steps

        return nullcontext(advance)

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("skip", [["lm_head"], [], ["lm_head", "blocks.0.*"]])
def test_progress_ends_at_its_total(skip: list[str]) -> None:
    listener = Listener()
    quantize_sequential(Model(), SCHEME, windows(3), skip=skip, progress=listener)
    assert listener.steps == listener.total
    assert listener.notes == []


def test_errors() -> None:
    with pytest.raises(UsageError, match="Linear has no blocks, embed, context, head"):
        quantize_sequential(nn.Linear(32, 32), SCHEME, windows())
    calibration = windows()
    calibration.tokens[0, 0] = VOCABULARY
    with pytest.raises(TextError, match=f"has token {VOCABULARY}, and the model only {VOCABULARY} tokens"):
        quantize_sequential(Model(), SCHEME, calibration)
    model = Model()
    model.blocks[1].norm.weight.data[3] = float("nan")
    with pytest.raises(SchemeError, match=r"inputs of blocks.1.first, blocks.1.other are not finite"):
        quantize_sequential(model, SCHEME, windows())
    model = Model()
    model.blocks[1].spare = nn.Linear(32, 32)
    with pytest.raises(SchemeError, match=r"blocks.1.spare did not run"):
        quantize_sequential(model, SCHEME, windows())
    with pytest.raises(UsageError, match="matches no linear"):
        quantize_sequential(Model(), SCHEME, windows(), skip=["nothing"])


@pytest.mark.slow
def test_gptq_beats_rounding_to_nearest_on_the_trained_model(wt2_8m: Path) -> None:
    from llmq.calibration.corpus import resolve_text, token_windows
    from llmq.calibration.recorder import InputRecorder
    from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint

    sample = Path(__file__).parents[2] / "llmq" / "assets" / "sample"
    checkpoint = open_checkpoint(wt2_8m)
    tokenizer = load_tokenizer_for(checkpoint)
    text = resolve_text(sample / "evaluation.txt", split="test")
    tokens = token_windows(tokenizer, text, 16, 128, seed=0)
    calibration = InputRecorder(tokenizer, windows=32, length=256).record_text(sample / "calibration.txt")

    def divergence(model: nn.Module) -> float:
        with torch.no_grad():
            return (
                nn.functional.kl_div(model(tokens).log_softmax(-1), exact, log_target=True, reduction="none")
                .sum(-1)
                .mean()
                .item()
            )

    with torch.no_grad():
        exact = load_model(checkpoint, dtype=torch.float32)(tokens).log_softmax(-1)
    options = {"group_size": 128}
    model = load_model(checkpoint, dtype=torch.float32)
    quantize_(model, "int4", options=options, skip=["lm_head"])
    nearest = divergence(model)
    model = load_model(checkpoint, dtype=torch.float32)
    _, reports = quantize_sequential(model, resolve("int4-gptq", options), calibration, skip=["lm_head"])
    assert len(reports) == 56
    for report in reports:
        assert report.loss is not None
        assert report.rtn_loss is not None
        assert report.loss <= report.rtn_loss
        assert report.fallback is None
    assert divergence(model) < 0.8 * nearest


def test_windows_longer_than_the_context(wt2_8m: Path) -> None:
    from llmq.checkpoint import load_model, open_checkpoint

    calibration = windows(1, 300)
    with pytest.raises(UsageError, match="256"):
        quantize_sequential(load_model(open_checkpoint(wt2_8m)), resolve("int4-gptq"), replace(calibration), skip=["lm_head"])


def test_what_follows_sees_the_rounding_of_inputs() -> None:
    """A float copy of a block in int8-dynamic computes what the kernels of that format compute, but for fp32 sums."""
    from llmq.calibration.stages import block_model, stages_of

    model = Model()
    h = torch.randn(2, 8, WIDTH) * torch.logspace(-1, 1, 8)[:, None]
    quantize_(model, "int8-dynamic", skip=["lm_head"])
    stage = stages_of(block_model(model), [])[0]
    with torch.no_grad():
        exact = stage.forward(stage.module, h, 0.5)
        copied = stage.forward(stage.float_copy(), h, 0.5)
    torch.testing.assert_close(copied, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    weights_only = stage.float_copy()
    for module in weights_only.modules():
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        assert (stage.forward(weights_only, h, 0.5) - exact).abs().max() > 20 * (copied - exact).abs().max()


def dtypes_seen(monkeypatch: pytest.MonkeyPatch, scheme: str, activations: str) -> set[torch.dtype]:
    """The dtypes of what the blocks' first linears return while a scheme is applied."""
    monkeypatch.setattr(products, "has_bf16_dot", lambda: True)
    monkeypatch.setattr(products, "LEAST_INNER", 1)
    seen: set[torch.dtype] = set()
    original = torch.relu
    monkeypatch.setattr(torch, "relu", lambda x: (seen.add(x.dtype), original(x))[1])
    model = Model()
    quantize_sequential(
        model, resolve(scheme, {"group_size": 32}), windows(), skip=["lm_head"], settings=WalkSettings(activations=activations)
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return seen


@pytest.mark.parametrize(
    ("scheme", "activations", "dtype"),
    [
        ("int4-gptq", "bf16", torch.bfloat16),
        ("int4-gptq", "fp32", torch.float32),
        ("int4-autoround", "bf16", torch.float32),
        ("int4-yaqa", "bf16", torch.float32),
    ],
)
def test_blocks_compute_in_bf16_where_asked_for_no_more(
    monkeypatch: pytest.MonkeyPatch, scheme: str, activations: str, dtype: torch.dtype
) -> None:
    assert dtypes_seen(monkeypatch, scheme, activations) == {dtype}
