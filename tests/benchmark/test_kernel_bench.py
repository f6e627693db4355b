"""Kernels are timed on the cases they can run, after they have shown that they are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq.api.benching import parse_shapes
from llmq.benchmark import contender, kernels
from llmq.benchmark.kernels import KernelPlan, KernelReport, bench_kernels, measure_int8_peak, shapes_of
from llmq.benchmark.machine import Bandwidth, Peak
from llmq.benchmark.order_statistics import median, summarize
from llmq.benchmark.random_weights import random_weight
from llmq.benchmark.timing import TimingPlan
from llmq.errors import ShapeError, UsageError
from llmq.model.config import LlamaConfig
from llmq.numerics.grid import ActivationGrid, FloatGrid, IntGrid, LinearFormat
from llmq.ops.reference import Reference
from llmq.ops.schema import SUPPORTED, Case, Support, unsupported

INT8 = LinearFormat(IntGrid(8))
INT4 = LinearFormat(IntGrid(4, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16"))
FORMATS = {"bf16": LinearFormat(FloatGrid("bfloat16")), "int8-dynamic": LinearFormat(IntGrid(8), ActivationGrid()), "int4": INT4}
QUICK = TimingPlan(repeats=3, warmup=1)


@pytest.fixture(scope="module")
def report() -> KernelReport:
    return bench_kernels(KernelPlan(FORMATS, ((64, 128), (32, 64)), (1, 5), timing=QUICK), threads=1)


def test_every_case_has_the_reference_and_one_chosen_kernel(report: KernelReport) -> None:
    cases = {(result.format, result.n, result.k, result.rows) for result in report.results}
    assert cases == {(name, n, k, rows) for name in FORMATS for n, k in ((64, 128), (32, 64)) for rows in (1, 5)}
    for case in cases:
        group = [result for result in report.results if (result.format, result.n, result.k, result.rows) == case]
        assert "reference" in [result.kernel for result in group]
        (chosen,) = [result for result in group if result.chosen]
        assert chosen.ratio_to_chosen is not None
        assert chosen.ratio_to_chosen.interval == (1.0, 1.0)
    assert report.threads == 1


def test_figures_follow_from_the_shape(report: KernelReport) -> None:
    (result,) = [r for r in report.results if (r.format, r.n, r.rows, r.kernel) == ("int4", 64, 5, "reference")]
    # half a byte a code, a scale and a zero point of two bytes a group; x and y in bf16
    assert result.moved_bytes == 64 * 128 // 2 + 64 * 4 * 4 + 5 * (64 + 128) * 2
    seconds = median(result.seconds)
    assert result.gops * seconds == pytest.approx(2 * 5 * 64 * 128 / 1e9)
    assert result.gbps * seconds == pytest.approx(result.moved_bytes / 1e9)
    wall = Bandwidth("cpu", 1, "counted", 10**9, 10**9, summarize([0.1]), (0.1,))
    peak = Peak("cpu", 1, "float32", "torch.mm", 1000, summarize([0.5]))
    metrics = result.metrics(wall, peak)
    assert metrics["bandwidth_share"].value == pytest.approx(result.gbps / 10)
    assert metrics["float32_peak_share"].value == pytest.approx(result.gops / 4)
    assert metrics["call_s"].value == seconds
    assert "bandwidth_share" not in result.metrics()
    assert result.protocol().params == {"format": "int4", "n": 64, "k": 128, "rows": 5, "dtype": "bfloat16"}


def test_those_that_cannot_run_say_why(report: KernelReport) -> None:
    reasons = {(refusal.kernel, refusal.format): refusal.reason for refusal in report.refusals}
    assert "CUDA" in reasons["tinygemm", "int4"]
    assert all(reasons.values())


class Fake(Reference):
    """The reference under another name, with something changed."""

    def __init__(self, name: str, change: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        self.name = name
        self.change = change
        self.seen: list[int] = []

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        self.seen.append(tensors[0].data_ptr())
        return self.change(super().linear(x, tensors, bias, case))


def offer(monkeypatch: pytest.MonkeyPatch, *offered: tuple[Fake, Support]) -> None:
    answers = [*offered, (Reference(), SUPPORTED)]
    monkeypatch.setattr(kernels, "candidates", lambda case: answers)


def late_column(y: Tensor) -> Tensor:
    """One output of many is off by two units in the last place of bf16."""
    changed = y.clone()
    changed[0, 1500] *= 1 + 2**-6
    return changed


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right, absent = Fake("wrong", late_column), Fake("right"), Fake("absent")
    offer(monkeypatch, (wrong, SUPPORTED), (right, SUPPORTED), (absent, unsupported("it is not here")))
    report = bench_kernels(KernelPlan({"int8": INT8}, ((2048, 64),), (1, 2), timing=QUICK))
    assert {result.kernel for result in report.results} == {"right", "reference"}
    refused = {refusal.kernel: refusal.reason for refusal in report.refusals}
    assert refused["wrong"].startswith("it is wrong for 1 rows: in outputs 1024 to 2047, element (0, 476)")
    assert refused["absent"] == "it is not here"
    assert len(wrong.seen) == 1
    assert not absent.seen


def test_weights_take_turns_so_that_they_come_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("fake")
    offer(monkeypatch, (fake, SUPPORTED))
    monkeypatch.setattr(contender, "last_level_cache_bytes", lambda: 20_000)
    plan = KernelPlan({"int8": INT8}, ((128, 64),), (1,), timing=TimingPlan(repeats=25, warmup=0))
    bench_kernels(plan)
    stored = 128 * 64 + 128 * 4
    timed = fake.seen[1:]
    assert len(set(timed)) == 1 + 4 * 20_000 // stored
    assert timed[0] == timed[len(set(timed))]


def test_a_chosen_kernel_that_fails_leaves_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    monkeypatch.setattr(kernels, "_chosen", lambda weight, case, rows: "gone")
    report = bench_kernels(KernelPlan({"int8": INT8}, ((32, 64),), (1,), timing=QUICK))
    assert report.results[0].ratio_to_chosen is None
    assert "ratio_to_chosen" not in report.results[0].metrics()


@pytest.mark.parametrize(
    "form",
    [
        *FORMATS.values(),
        INT8,
        LinearFormat(IntGrid(4, 32, symmetric=False, zero_point="int")),
        LinearFormat(IntGrid(3, 32)),
        LinearFormat(FloatGrid("float16")),
    ],
    ids=str,
)
def test_random_weights_use_the_whole_grid(form: LinearFormat) -> None:
    weight = random_weight(Case(form, 64, 128, torch.bfloat16, "cpu"), torch.Generator().manual_seed(1))
    assert weight.shape == (64, 128)
    assert weight.dequantize().isfinite().all()
    if isinstance(form.weight, IntGrid):
        assert (weight.codes().min(), weight.codes().max()) == (form.weight.qmin, form.weight.qmax)


def test_an_int8_peak_is_that_of_integer_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    assert measure_int8_peak(size=64) is None
    offer(monkeypatch, (Fake("integer"), SUPPORTED))
    peak = measure_int8_peak(size=64)
    assert peak is not None
    assert (peak.method, peak.dtype, peak.size) == ("integer", "int8", 64)
    assert list(peak.metrics()) == ["peak_int8"]


def test_shapes_of_a_model_come_once() -> None:
    config = LlamaConfig(1000, 64, 96, 3, 4, 2, 16, 128, 1e-5, 10000.0)
    assert shapes_of(config) == ((64, 64), (32, 64), (96, 64), (64, 96), (1000, 64))


def test_a_shape_that_does_not_fit_is_refused_before_anything_runs() -> None:
    with pytest.raises(ShapeError, match=r"a weight of int4 \[64, 100\] does not fit"):
        bench_kernels(KernelPlan({"bf16": FORMATS["bf16"], "int4": INT4}, ((64, 100),)))


@pytest.mark.parametrize(("shapes", "rows"), [((), (1,)), (((1, 2),), ()), (((0, 2),), (1,)), (((1, 2),), (0,))])
def test_nothing_to_time_is_refused(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        KernelPlan({"int8": INT8}, shapes, rows)


def test_shapes_are_numbers_or_names_of_models() -> None:
    assert parse_shapes("64x128, 1.1B") == [(64, 128), (2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)]
    assert (14336, 4096) in parse_shapes("8b")
    with pytest.raises(UsageError, match=r"1\.1b, 7b, 8b.*got '70b'"):
        parse_shapes("70b")
