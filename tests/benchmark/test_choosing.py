"""Timing kernels to choose among them: on cold weights, all in the same rounds, and on a GPU in a recording."""

from __future__ import annotations

import pytest
import torch
from replaying import Again, Refuses
from torch import Tensor

from llmq.benchmark import choosing, contender
from llmq.benchmark.choosing import KernelTimer
from llmq.benchmark.contender import Contender
from llmq.benchmark.random_weights import random_weight
from llmq.benchmark.timing import TimingPlan
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.ops.choices import ROWS
from llmq.ops.dense import DequantGemm
from llmq.ops.schema import Case
from llmq.ops.table import kernel_named

CASE = Case(LinearFormat(IntGrid(8)), 64, 128, torch.bfloat16, "cpu")


class Slow(DequantGemm):
    """Ten times the work."""

    name = "slow"

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        for _ in range(9):
            super().linear(x, tensors, bias, case)
        return super().linear(x, tensors, bias, case)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_TIMING", TimingPlan(repeats=3, warmup=1))
    monkeypatch.setattr(contender, "last_level_cache_bytes", lambda: 64 * 128)


def test_every_kernel_for_every_number_of_rows() -> None:
    times = KernelTimer()(CASE, (DequantGemm(), Slow()))
    assert list(times) == ["dequant-gemm", "slow"]
    for fast, slow in zip(*times.values(), strict=True):
        assert 0 < 3 * fast < slow
    assert len(times["slow"]) == len(ROWS)


def test_weights_are_cold() -> None:
    weight = random_weight(CASE, torch.Generator().manual_seed(0))
    seen: list[int] = []

    class Spy(DequantGemm):
        def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
            seen.append(tensors[0].data_ptr())
            return super().linear(x, tensors, bias, case)

    contending = Contender(Spy(), weight.tensors)
    call = contending.call(torch.zeros(1, 128, dtype=torch.bfloat16), CASE)
    for _ in range(8):
        call()
    assert contending.copies == 4  # with scales, a copy is a little more than this cache
    assert len(set(seen)) == 4
    assert seen[:4] == seen[4:]


def test_on_a_gpu_many_calls_are_one_recording() -> None:
    recorder = Again()
    timer = KernelTimer(capture=lambda device: recorder)
    contending = Contender(DequantGemm(), random_weight(CASE, torch.Generator().manual_seed(0)).tensors)
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    call, products = timer._prepare(contending, x, Case(CASE.format, 64, 128, torch.bfloat16, "cuda"))
    assert products == 8
    call()
    assert recorder.replayed == 1
    assert timer._prepare(contending, x, CASE)[1] == 1
    assert recorder.replayed == 1


def test_what_cannot_be_recorded_is_timed_as_it_runs() -> None:
    timer = KernelTimer(capture=lambda device: Refuses())
    contending = Contender(kernel_named("reference"), random_weight(CASE, torch.Generator().manual_seed(0)).tensors)
    case = Case(CASE.format, 64, 128, torch.bfloat16, "cuda")
    call, products = timer._prepare(contending, torch.ones(1, 128, dtype=torch.bfloat16), case)
    assert products == 1
    y = call()
    assert isinstance(y, Tensor)
    assert y.shape == (1, 64)
