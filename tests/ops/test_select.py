"""Choosing kernels: what runs, what was rejected and why, and that a kernel is believed only after its start-up test."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORMATS, case_of, make_x, quantized_linear
from torch import nn

from llmq.errors import KernelError
from llmq.ops import features, native, select, table
from llmq.ops.aten import AtenInt4PackCpu, AtenInt8Pack, AtenIntMm
from llmq.ops.cpu import NATIVE_KERNELS
from llmq.ops.dense import DenseUpcast, DequantGemm
from llmq.ops.schema import Case
from llmq.ops.select import candidates, kernel_table, prepare, record_usage, unprepare
from llmq.ops.table import KERNELS, describe_rows, kernel_named, row_ranges

BF16 = torch.bfloat16
x86 = pytest.mark.skipif(
    not features.is_x86() or features.aten_capability() not in {"AVX2", "AVX512"},
    reason="the packed kernels are for AVX2 and AVX512",
)


def mixed() -> nn.ModuleDict:
    modules = {name: quantized_linear(name, 48, 128, BF16) for name in ("int4", "int8-weight-only", "int8-dynamic", "bf16")}
    return nn.ModuleDict({**modules, "norm": nn.LayerNorm(128), "plain": nn.Linear(8, 8)})


def test_prepare_reports_each_weight_and_changes_no_number():
    module = mixed()
    before = {name: module[name].weight.weight.tensors for name in FORMATS if name in module}
    choices = {choice.fqn: choice for choice in prepare(module)}
    assert sorted(choices) == ["bf16.weight", "int4.weight", "int8-dynamic.weight", "int8-weight-only.weight"]
    known = {kernel.name for kernel in KERNELS}
    for name, tensors in before.items():
        weight, choice = module[name].weight, choices[f"{name}.weight"]
        assert isinstance(weight, nn.Parameter)
        assert choice.layout == weight.kernel_layout
        assert choice.kernels == describe_rows(weight.kernels)
        assert set(weight.kernels) | set(choice.rejected) == known
        assert not set(weight.kernels) & set(choice.rejected)
        assert all(choice.rejected.values())
        assert all(torch.equal(a, b) for a, b in zip(tensors, weight.weight.tensors, strict=True))
    unprepare(module)
    for name, tensors in before.items():
        assert module[name].weight.kernels == ("reference",)
        assert module[name].weight.kernel_layout == "canonical"
        assert all(torch.equal(a, b) for a, b in zip(tensors, module[name].weight.stored, strict=True))


def test_the_native_kernels_come_first_where_they_run():
    answer = NATIVE_KERNELS[0].available()
    if not answer.ok:
        pytest.skip(answer.reason)
    choices = {choice.fqn.removesuffix(".weight"): choice for choice in prepare(mixed())}
    chosen = {name: choice.kernels for name, choice in choices.items()}
    assert chosen == {
        "int4": "native-int4",
        "int8-weight-only": "native-int8",
        "int8-dynamic": "native-int8-dynamic",
        "bf16": "native-bf16",
    }
    assert all(choice.layout.startswith("native-") for choice in choices.values())
    assert len({choice.layout for choice in choices.values()}) == 3  # one of int8, whatever it is multiplied with


@x86
def test_the_packed_kernels_are_chosen_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: native.Unavailable("it was not built."))
    module = mixed()
    choices = {choice.fqn: choice for choice in prepare(module)}
    assert choices["int4.weight"].kernels == "aten-int4pack-cpu"
    assert choices["int4.weight"].layout == f"int4pack-{features.aten_capability().lower()}"
    assert choices["int4.weight"].rejected["native-int4"] == "it was not built"
    assert choices["int8-weight-only.weight"].kernels == "1-63 rows: aten-int8pack; 64+ rows: dequant-gemm"
    assert choices["int8-weight-only.weight"].layout == "canonical"


def test_preparing_twice_is_preparing_once():
    module = mixed()
    first = prepare(module)
    assert prepare(module) == first


def test_prefer_runs_for_every_number_of_rows():
    module = mixed()
    choices = {choice.fqn: choice for choice in prepare(module, prefer="dequant-gemm")}
    assert choices["int4.weight"].kernels == "dequant-gemm"
    assert choices["int8-weight-only.weight"].kernels == "dequant-gemm"
    assert choices["int8-weight-only.weight"].rejected["reference"] == "dequant-gemm was asked for"
    assert choices["bf16.weight"].rejected["dequant-gemm"] == "the weight is not quantized"
    with record_usage() as usage:
        module["int8-weight-only"](make_x(3, 128, BF16))
    assert usage.calls == {"dequant-gemm": 1}
    prepare(module, prefer="reference")
    assert {module[name].weight.kernels for name in ("int4", "bf16", "int8-dynamic")} == {("reference",)}


def test_prefer_that_cannot_run_raises_and_changes_nothing():
    module = nn.ModuleDict({"a": quantized_linear("int3", 48, 128, BF16)})
    spec = module["a"].weight.spec
    with pytest.raises(KernelError, match=r"kernel 'aten-int8pack' can run none of the 1 quantized weights: .*"):
        prepare(module, prefer="aten-int8pack")
    with pytest.raises(KernelError, match=r"unknown kernel 'aten-int8' *\. *Did you mean 'aten-int8pack'\?"):
        prepare(module, prefer="aten-int8")
    assert module["a"].weight.spec == spec
    assert prepare(nn.Linear(2, 2), prefer="reference") == []


def test_a_shared_weight_stays_shared():
    one, two = quantized_linear("int4", 48, 128, BF16), quantized_linear("int4", 48, 128, BF16)
    two.weight = one.weight
    module = nn.ModuleDict({"one": one, "two": two})
    assert [choice.fqn for choice in prepare(module)] == ["one.weight", "two.weight"]
    assert module["one"].weight is module["two"].weight
    unprepare(module)
    assert module["one"].weight is module["two"].weight


def test_usage_names_what_ran_and_counts_linears():
    module = mixed()
    x1, x9 = make_x(1, 128, BF16), make_x(9, 128, BF16)
    with record_usage() as outer:
        module["int4"](x1)
        with record_usage() as inner:
            module["int4"](x1)
            module["int4"](x9)
            module["bf16"](x9)
            with torch.inference_mode():
                _ = x9 @ module["int4"].weight.T
    assert inner.calls == {"reference": 4}
    assert inner.linears() == {"reference": 2}
    assert outer.calls == {"reference": 1}
    prepare(module)
    with record_usage() as usage:
        for name in ("int4", "bf16", "int8-dynamic"):
            module[name](x9)
    expected = [module[name].weight.pick(9).name for name in ("int4", "bf16", "int8-dynamic")]
    assert usage.calls == {name: expected.count(name) for name in expected}
    module["int4"](x1)
    assert sum(usage.calls.values()) == 3  # nothing is counted outside


def test_rows_are_shared_out():
    assert describe_rows(("reference",)) == "reference"
    assert describe_rows(("dense-upcast", "torch-dense")) == "1-7 rows: torch-dense; 8+ rows: dense-upcast"
    assert describe_rows(("aten-int8pack", "dequant-gemm")) == "1-63 rows: aten-int8pack; 64+ rows: dequant-gemm"
    assert [(last, kernel.name) for last, kernel in row_ranges(("aten-int8pack", "reference"))] == [
        (63, "aten-int8pack"),
        (None, "reference"),
    ]
    weight = quantized_linear("bf16", 16, 64, BF16).weight.with_kernels("canonical", ("dense-upcast", "torch-dense"))
    assert [weight.pick(rows).name for rows in (0, 1, 7, 8, 9000)] == ["torch-dense"] * 3 + ["dense-upcast"] * 2


def test_a_kernel_in_the_middle_of_the_rows(monkeypatch):
    class Narrow(DequantGemm):
        name, min_rows, max_rows = "narrow", 4, 4

    monkeypatch.setattr(table, "KERNELS", (Narrow(), *KERNELS))
    row_ranges.cache_clear()
    try:
        assert describe_rows(("narrow", "reference")) == "1-3 rows: reference; 4 rows: narrow; 5+ rows: reference"
    finally:
        row_ranges.cache_clear()


class WrongScale(DequantGemm):
    name = "wrong-scale"

    def linear(self, x, tensors, bias, case):
        return super().linear(x, tensors, bias, case) * 1.01


class WrongUnpack(DequantGemm):
    name = "wrong-unpack"

    def prepack(self, weight):
        return (weight.qdata.flip(0), *weight.tensors[1:])


class Raises(DequantGemm):
    name = "raises"

    def linear(self, x, tensors, bias, case):
        raise RuntimeError("no such instruction\nmore")


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (WrongScale(), "its start-up test failed: element ("),
        (WrongUnpack(), "its start-up test failed: unpacking does not give back what was packed"),
        (Raises(), "its start-up test raised RuntimeError: no such instruction"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_start_up_test_disqualifies(monkeypatch, kernel, words):
    monkeypatch.setattr(table, "KERNELS", (kernel, *KERNELS))
    monkeypatch.setattr(select, "KERNELS", (kernel, *KERNELS))
    answers = {k.name: answer for k, answer in candidates(case_of(FORMATS["int4"], 48, 128, BF16))}
    assert kernel.supports(case_of(FORMATS["int4"], 48, 128, BF16)).ok
    assert not answers[kernel.name].ok
    assert answers[kernel.name].reason.startswith(words)
    module = quantized_linear("int4", 48, 128, BF16)
    choice = prepare(module)[0]
    assert kernel.name not in module.weight.kernels
    assert choice.rejected[kernel.name].startswith(words)


@pytest.mark.parametrize("name", FORMATS)
def test_every_kernel_that_supports_a_format_passes_its_start_up_test(name):
    for dtype in (torch.float32, BF16):
        for kernel, answer in candidates(case_of(FORMATS[name], 48, 192, dtype)):
            assert answer.ok or "start-up" not in answer.reason, f"{kernel.name}: {answer.reason}"
        assert candidates(case_of(FORMATS[name], 48, 192, dtype))[-1][1].ok  # the reference


def test_the_table_lists_every_kernel_with_a_reason_when_it_cannot_run():
    rows = kernel_table()
    assert [row.name for row in rows] == [kernel.name for kernel in KERNELS]
    assert all(row.available != bool(row.reason) for row in rows)
    assert all(row.formats and row.layout and row.rows for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    assert kernel_named("reference").name == "reference"


@pytest.mark.parametrize(
    ("kernel", "name", "n", "k", "dtype", "words"),
    [
        (AtenInt8Pack(), "int8-weight-only", 16, 64, torch.float32, "vectorised for bfloat16 only"),
        (AtenInt8Pack(), "int8-weight-only", 16, 68, BF16, "without a tail, and K is 68"),
        (AtenInt8Pack(), "int8-weight-only-fp32-scale", 16, 64, BF16, "would change the weights"),
        (AtenInt8Pack(), "int8-groups", 16, 64, BF16, "one scale a row"),
        (AtenInt8Pack(), "int8-dynamic", 16, 64, BF16, "does not quantize activations"),
        (AtenInt4PackCpu(), "int4", 24, 64, BF16, "multiples of 16 outputs, and N is 24"),
        (AtenInt4PackCpu(), "int4-integer-zero", 16, 64, BF16, "integer zero point"),
        (AtenInt4PackCpu(), "int5", 16, 64, BF16, "weights of 2 to 4 bits"),
    ],
)
@x86
def test_a_packed_kernel_names_the_guard(kernel, name, n, k, dtype, words):
    answer = kernel.supports(case_of(FORMATS[name], n, k, dtype))
    assert not answer.ok
    assert words in answer.reason


def test_features_decide_what_is_offered(monkeypatch):
    case, dynamic = case_of(FORMATS["bf16"], 16, 64, BF16), case_of(FORMATS["int8-dynamic"], 16, 64, BF16)
    packed = case_of(FORMATS["int8-weight-only"], 16, 40, BF16)
    fake = {"flags": frozenset({"avx512_vnni", "avx512_bf16"}), "capability": "AVX512"}
    monkeypatch.setattr(features, "cpu_flags", lambda: fake["flags"])
    for module in ("llmq.ops.features", "llmq.ops.aten"):
        monkeypatch.setattr(f"{module}.aten_capability", lambda: fake["capability"])
    monkeypatch.setattr("llmq.ops.aten.is_x86", lambda: True)
    assert AtenIntMm().supports(dynamic).ok
    assert "natively" in DenseUpcast().supports(case).reason
    assert "16 at a time" in AtenInt8Pack().supports(packed).reason
    assert AtenInt4PackCpu().layout == "int4pack-avx512"
    fake.update(flags=frozenset({"avx2"}), capability="AVX2")
    assert "no AVX-512 VNNI" in AtenIntMm().supports(dynamic).reason
    assert DenseUpcast().supports(case).ok
    assert AtenInt8Pack().supports(packed).ok
    fake.update(flags=frozenset(), capability="DEFAULT")
    assert "torch runs DEFAULT here" in AtenInt8Pack().supports(packed).reason
    monkeypatch.setattr("llmq.ops.aten.is_x86", lambda: False)
    assert "x86 only" in AtenInt4PackCpu().supports(case_of(FORMATS["int4"], 16, 64, BF16)).reason


def test_flags_are_read_from_both_kinds_of_cpuinfo(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(features, "_CPUINFO", path)
    read = features.cpu_flags.__wrapped__
    assert read() == frozenset()
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert read() == {"fpu", "avx2", "fma"}
    path.write_text("processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\n")
    assert read() == {"fp", "asimd", "asimdhp", "bf16"}


def test_a_meta_weight_can_be_planned_without_running_anything():
    answers = candidates(Case(FORMATS["int4"], 48, 128, BF16, "meta"))
    assert answers[-1][1].ok
    assert "on meta" in next(answer.reason for kernel, answer in answers if kernel.name == "aten-int4pack-cpu")
