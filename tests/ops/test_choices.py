"""Choosing by times: the layout that serves decoding, the rows of each kernel, and that what was chosen runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from op_cases import make_x, quantized_linear

from llmq.ops import select, table
from llmq.ops.choices import MARGIN, Plan, Times, fastest_plan
from llmq.ops.dense import DequantGemm
from llmq.ops.schema import Case, Kernel
from llmq.ops.select import FIXED, prepare, record_usage, unprepare
from llmq.ops.table import describe_rows, row_ranges

BF16 = torch.bfloat16
US = 1e-6


class Named(DequantGemm):
    """A kernel that computes what another does, under a name and in a layout of its own."""

    def __init__(self, name: str, layout: str = "canonical") -> None:
        self.name, self.layout = name, layout


A, B, C, D = Named("a"), Named("b"), Named("c", "tiles"), Named("d", "tiles")


def chosen(kernels: Sequence[Kernel], **times: Sequence[float]) -> Plan:
    return fastest_plan(kernels, {name: [each * US for each in seconds] for name, seconds in times.items()})


def test_the_fastest_of_one_layout_takes_its_rows():
    plan = chosen((A, B), a=[10, 12, 40, 900], b=[20, 22, 24, 300])
    assert (plan.layout, plan.kernels, plan.until) == ("canonical", ("a", "b"), (8, None))
    assert chosen((A, B), a=[10, 10, 10, 10], b=[20, 20, 20, 5]).until == (90, None)
    assert chosen((A, B), a=[10, 20, 10, 10], b=[20, 10, 20, 20]).kernels == ("a", "b", "a")
    assert chosen((A, B), a=[10, 20, 10, 10], b=[20, 10, 20, 20]).until == (2, 8, None)
    alone = chosen((A, B), a=[10, 10, 10, 10], b=[20, 20, 20, 20])
    assert (alone.kernels, alone.until) == (("a",), ())


def test_a_weight_has_one_layout_and_decoding_decides_it():
    fast_decode = {"a": [10, 10, 20, 4000], "c": [15, 15, 20, 1000]}
    assert chosen((A, C), **fast_decode).layout == "canonical"
    assert chosen((C, A), **fast_decode).layout == "canonical"  # whatever the order
    # a tie in decoding is broken by prompts, with the best kernels of each layout
    plan = chosen((A, B, C, D), a=[10, 10, 20, 900], b=[30, 30, 30, 800], c=[10, 10, 20, 2000], d=[40, 40, 40, 100])
    assert (plan.layout, plan.kernels, plan.until) == ("tiles", ("c", "d"), (90, None))
    assert set(plan.rejected) == {"a", "b"}


def test_equal_as_far_as_can_be_told_is_the_tables_order():
    near = 10 / MARGIN + 0.01
    assert chosen((A, B, C), a=[10] * 4, b=[near] * 4, c=[near] * 4).kernels == ("a",)
    assert chosen((A, B), a=[10] * 4, b=[9] * 4).kernels == ("b",)
    assert chosen((A, C), a=[10] * 4, c=[9] * 4).layout == "tiles"


def test_the_reason_names_both_times():
    plan = chosen((A, B, C), a=[41.26, 50, 60, 1250], b=[55, 60, 70, 3000], c=[70, 80, 90, 5000])
    assert plan.why == "measured for 1 and 512 rows: 41.3 us and 1.25 ms, against 55 us and 3 ms of b"
    assert plan.rejected["c"] == "measured for 1 and 512 rows: 70 us and 5 ms, against 41.3 us and 1.25 ms"


def test_measured_rows_are_described_and_picked():
    names, until = ("dequant-gemm", "reference", "dequant-gemm"), (2, 8, None)
    assert describe_rows(names, until) == "1-2 rows: dequant-gemm; 3-8 rows: reference; 9+ rows: dequant-gemm"
    weight = quantized_linear("int4", 16, 64, BF16).weight.with_kernels("canonical", names, until)
    assert [weight.pick(rows).name for rows in (0, 1, 2, 3, 8, 9, 900)] == [names[0]] * 3 + [names[1]] * 2 + [names[0]] * 2
    assert weight.T.pick(3).name == "reference"
    assert weight.detach().spec.until == until


@pytest.fixture
def fake_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels = (A, B, *(kernel for kernel in table.KERNELS if kernel.name == "reference"))
    monkeypatch.setattr(table, "KERNELS", kernels)
    monkeypatch.setattr(select, "KERNELS", kernels)
    row_ranges.cache_clear()
    select._self_test.cache_clear()
    yield
    row_ranges.cache_clear()
    select._self_test.cache_clear()


class Scripted:
    """A timer that says what it is told, and remembers what it was asked."""

    def __init__(self, **times: Sequence[float]) -> None:
        self.times = times
        self.asked: list[tuple[Case, tuple[str, ...]]] = []

    def __call__(self, case: Case, kernels: Sequence[Kernel]) -> Times:
        self.asked.append((case, tuple(kernel.name for kernel in kernels)))
        return {kernel.name: self.times[kernel.name] for kernel in kernels}


@pytest.mark.usefixtures("fake_table")
def test_prepare_takes_what_was_measured():
    timer = Scripted(a=[2e-5, 2e-5, 2e-5, 1e-3], b=[1e-5, 1e-5, 1e-5, 2e-3])
    module = torch.nn.Sequential(quantized_linear("int4", 48, 128, BF16), quantized_linear("int4", 48, 128, BF16))
    x1, x100 = make_x(1, 128, BF16), make_x(100, 128, BF16)
    expected = [module[0](x) for x in (x1, x100)]
    choices = prepare(module, timer=timer)
    assert [asked for _, asked in timer.asked] == [("a", "b")]  # once for both, and the definition is not timed
    for choice in choices:
        assert choice.kernels == "1-90 rows: b; 91+ rows: a"
        assert choice.why == "measured for 1 and 512 rows: 10 us and 1 ms"
        assert choice.rejected == {"reference": "it defines the result, and is not timed"}
    with record_usage() as usage:
        got = [module[0](x) for x in (x1, x100)]
    assert usage.calls == {"b": 1, "a": 1}
    assert all(torch.allclose(y, other, atol=0.05) for y, other in zip(got, expected, strict=True))
    unprepare(module)
    assert module[0].weight.spec.until == ()
    assert prepare(module)[0].kernels == "a"
    assert prepare(module)[0].why == FIXED


@pytest.mark.usefixtures("fake_table")
def test_a_wish_is_not_measured():
    timer = Scripted()
    choice = prepare(quantized_linear("int4", 48, 128, BF16), prefer="b", timer=timer)[0]
    assert (choice.kernels, choice.why) == ("b", "it was asked for")
    assert timer.asked == []


def test_where_one_kernel_fits_nothing_is_measured(monkeypatch: pytest.MonkeyPatch):
    only = tuple(kernel for kernel in table.KERNELS if kernel.name in ("dequant-gemm", "reference"))
    monkeypatch.setattr(select, "KERNELS", only)
    timer = Scripted()
    assert prepare(quantized_linear("int4", 48, 128, BF16), timer=timer)[0].why == FIXED
    assert timer.asked == []
