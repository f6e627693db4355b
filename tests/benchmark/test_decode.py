"""Prefill and decode of a tiny random Llama: what is run, what is counted, and what the figures mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from replaying import Again
from torch import Tensor, nn

from llmq.benchmark import decode
from llmq.benchmark.decode import PLAIN, bench_model, bench_models, model_nbytes
from llmq.benchmark.machine import Bandwidth
from llmq.benchmark.order_statistics import summarize
from llmq.benchmark.speed import BenchPlan, SpeedReport
from llmq.benchmark.traffic import traffic_of_model
from llmq.errors import UsageError
from llmq.model.compiled import CompiledLlama
from llmq.model.config import LlamaConfig
from llmq.model.cuda_graph import GraphLlama
from llmq.model.generate import generate
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.numerics.grid import FloatGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor
from llmq.results.environment import capture
from llmq.results.record import Subject
from llmq.results.table import comparison_table

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
WALL = Bandwidth("cpu", 1, "counted", 1 << 30, 1 << 30, summarize([0.1, 0.2]), (0.1, 0.2))
SUBJECT = Subject(model="tiny", checkpoint_sha256="a", scheme="fp32")


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG)


@pytest.fixture(scope="module")
def report() -> SpeedReport:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    plan = BenchPlan(batch_sizes=(1, 3), prompt_lengths=(8,), contexts=(8, 20), new_tokens=5, repeats=3)
    return bench_model(model, plan, threads=1, bandwidth=WALL)


def test_every_combination_is_measured_once(report: SpeedReport) -> None:
    assert [(result.batch_size, result.prompt_length) for result in report.prefills] == [(1, 8), (3, 8)]
    assert [(result.batch_size, result.context) for result in report.decodes] == [(1, 8), (1, 20), (3, 8), (3, 20)]
    assert report.threads == 1
    assert all(len(result.prefill_s) == len(result.ttft_s) == 3 for result in report.prefills)
    assert all(len(result.tpot_s) == 3 for result in report.decodes)


def test_the_figures_fit_together(model: Llama, report: SpeedReport) -> None:
    traffic = traffic_of_model(model)
    for result in report.decodes:
        assert result.tokens_per_s * result.median_tpot_s == pytest.approx(result.batch_size)
        assert result.step_bytes == traffic.decode_bytes(result.batch_size, result.context + 3)  # the middle one of 5 steps
        assert result.achieved_gbps * 1e9 * result.median_tpot_s == pytest.approx(result.step_bytes.total)
        assert result.bandwidth_share == pytest.approx(result.achieved_gbps / (2**30 / 0.1 / 1e9))
        assert 0 < result.achieved_gbps < 1000
    for prefill in report.prefills:
        assert all(first > alone for first, alone in zip(prefill.ttft_s, prefill.prefill_s, strict=True))
        assert prefill.flops == traffic.prefill_flops(prefill.batch_size, 8)
        assert prefill.gflops > 0
    assert report.model_nbytes == sum(parameter.nbytes for parameter in model.parameters())


def test_what_is_timed_is_greedy_generation(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, int]] = []
    real = decode.decode_step

    def spy(model: Llama, cache: KVCache, tokens: Tensor, position: int | Tensor) -> Tensor:
        fed.append((int(position), int(tokens)))
        return real(model, cache, tokens, position)

    monkeypatch.setattr(decode, "decode_step", spy)
    bench_model(model, BenchPlan(prompt_lengths=(8,), new_tokens=6, repeats=2))
    prompt = torch.randint(96, (1, 8), generator=torch.Generator().manual_seed(0))[0].tolist()
    expected = list(enumerate(generate(model, prompt, max_new_tokens=6, stop=()), start=8))
    assert fed[0] == expected[0]  # run once, to see which kernels it takes
    assert fed[1:] == expected * 3  # a warm-up and two repeats


def test_records(report: SpeedReport) -> None:
    records = report.records(SUBJECT, capture(threads=1))
    assert [record.kind for record in records] == ["prefill"] * 2 + ["decode"] * 4
    prefill, step = records[0], records[2]
    assert prefill.protocol.params == {"batch_size": 1, "prompt_length": 8, "compile": False}
    assert step.protocol.params == {"batch_size": 1, "context": 8, "new_tokens": 5, "compile": False}
    assert {"tokens_per_s", "ttft_s", "prefill_s", "gflops", "peak_memory_bytes", "model_bytes"} == set(prefill.metrics)
    assert step.metrics["tpot_s"].value == sorted(step.metrics["tpot_s"].samples or [])[1]
    assert (step.metrics["tokens_per_s"].stderr or 0) > 0
    assert step.metrics["bytes_per_step"].unit == "bytes"
    assert step.metrics["bandwidth_share"].value > 0
    assert step.metrics["peak_memory_bytes"].value > step.metrics["model_bytes"].value
    assert step.kernels == {PLAIN: 15}
    assert "decode tok/s" in [column.heading for column in comparison_table([prefill, step]).columns]


def test_without_a_measured_wall_there_is_no_share_of_it(model: Llama) -> None:
    report = bench_model(model, BenchPlan(prompt_lengths=(4,), new_tokens=2, repeats=1))
    step = report.records(SUBJECT, capture(threads=1))[1]
    assert report.decodes[0].bandwidth_share is None
    assert "bandwidth_share" not in step.metrics
    assert step.metrics["tpot_s"].stderr is None  # one repeat knows no error


def wrap(model: Llama) -> Llama:
    """Put every linear's weight on the float grid, as the baselines do."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = QuantizedWeight.from_float(module.weight.detach())
            tensor = QuantizedTensor.from_weight(weight, LinearFormat(FloatGrid("float32")), torch.float32)
            module.weight = nn.Parameter(tensor, requires_grad=False)
    return model


def test_kernels_that_ran_are_reported(model: Llama) -> None:
    report = bench_model(wrap(model), BenchPlan(prompt_lengths=(4,), new_tokens=2, repeats=1))
    assert report.prefills[0].kernels == {"reference": 15}
    assert report.decodes[0].kernels == {"reference": 15}


def test_memory_that_is_shared_is_counted_once() -> None:
    tied = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    plain = sum(parameter.nbytes for parameter in tied.parameters())
    assert model_nbytes(tied) == plain
    assert model_nbytes(wrap(tied)) == plain


def test_threads_and_gradients_are_left_as_they_were(model: Llama) -> None:
    before = torch.get_num_threads()
    bench_model(model, BenchPlan(prompt_lengths=(4,), new_tokens=1, repeats=1), threads=1)
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_progress_is_told(model: Llama) -> None:
    class Listener:
        def __init__(self) -> None:
            self.total, self.done = 0, 0

        def task(self, description: str, total: int) -> Task:
            self.total = total
            return Task(self)

        def note(self, message: str) -> None:
            raise AssertionError(message)

    class Task:
        def __init__(self, listener: Listener) -> None:
            self.listener = listener

        def __enter__(self) -> Callable[[int], None]:
            def advance(steps: int) -> None:
                self.listener.done += steps

            return advance

        def __exit__(self, *error: object) -> None:
            pass

    listener = Listener()
    bench_model(model, BenchPlan((1, 2), (4,), (6,), new_tokens=1, repeats=1), progress=listener)
    assert listener.total == listener.done == 4


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BenchPlan(prompt_lengths=(65,), contexts=()), "a prompt of 65 tokens is beyond the model's context of 64"),
        (BenchPlan(contexts=(60,), new_tokens=5), r"a prompt of 128 tokens"),
        (BenchPlan(prompt_lengths=(4,), contexts=(60,), new_tokens=5), "5 new tokens after a context of 60 .* at most 59"),
        (BenchPlan(prompt_lengths=(4,), new_tokens=0), "new_tokens must be at least 1, got 0"),
        (BenchPlan(prompt_lengths=(), contexts=()), "lengths must be positive numbers, at least one of them"),
        (BenchPlan(batch_sizes=(0,)), "batch sizes must be positive numbers"),
    ],
)
def test_what_cannot_run_is_refused_before_it_runs(model: Llama, plan: BenchPlan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench_model(model, plan)


def test_several_models_take_turns(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Llama(dataclasses.replace(CONFIG, num_layers=1))
    order: list[tuple[int, int]] = []
    real = decode.decode_step

    def spy(model: Llama, cache: KVCache, tokens: Tensor, position: int | Tensor) -> Tensor:
        order.append((model.config.num_layers, int(position)))
        return real(model, cache, tokens, position)

    monkeypatch.setattr(decode, "decode_step", spy)
    reports = bench_models([model, other], BenchPlan(prompt_lengths=(8,), new_tokens=3, repeats=2), bandwidth=WALL)
    turn = [(layers, position) for layers in (2, 1) for position in (8, 9, 10)]
    assert order == [(2, 8), (1, 8)] + turn * 3
    assert [report.together for report in reports] == [2, 2]
    for report, own in zip(reports, (model, other), strict=True):
        assert len(report.prefills[0].prefill_s) == len(report.decodes[0].tpot_s) == 2
        assert report.decodes[0].step_bytes == traffic_of_model(own).decode_bytes(1, 8 + 2)
        assert report.model_nbytes == model_nbytes(own)
        (note,) = report.records(SUBJECT, capture(threads=1))[0].notes
        assert "all 2 models in memory" in note


def test_one_model_with_several_caches(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []
    real = decode.decode_step

    def spy(model: Llama, cache: KVCache, tokens: Tensor, position: int | Tensor) -> Tensor:
        used.append(cache.dtype)
        return real(model, cache, tokens, position)

    monkeypatch.setattr(decode, "decode_step", spy)
    dtypes = [torch.float32, torch.int8, None]
    reports = bench_models([model] * 3, BenchPlan(prompt_lengths=(8,), new_tokens=2, repeats=1), kv_dtypes=dtypes)
    turn = [torch.float32] * 2 + [torch.int8] * 2 + [model.dtype] * 2
    assert used == [torch.float32, torch.int8, model.dtype, *turn, *turn]
    for report, dtype in zip(reports, dtypes, strict=True):
        (step,) = (result.step_bytes for result in report.decodes)
        assert step == traffic_of_model(model, dtype).decode_bytes(1, 8 + 2)
        assert report.together == 1
        assert report.records(SUBJECT, capture(threads=1))[0].notes == []
    assert reports[1].decodes[0].step_bytes.kv < reports[0].decodes[0].step_bytes.kv / 2


def test_the_whole_context_and_one_token_more(model: Llama) -> None:
    limit = model.config.max_position_embeddings
    plan = BenchPlan(prompt_lengths=(limit,), contexts=(limit - 2,), new_tokens=2, repeats=1)
    report = bench_model(model, plan, kv_dtype=torch.int8)
    assert report.decodes[0].step_bytes.kv == traffic_of_model(model, torch.int8).kv_nbytes(1, limit)
    with pytest.raises(UsageError, match=f"use a context of at most {limit - 3}"):
        bench_model(model, dataclasses.replace(plan, new_tokens=3), kv_dtype=torch.int8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_what_is_compiled_before_anything_counts(model: Llama) -> None:
    runner = CompiledLlama(wrap(model), backend="eager")
    torch.compiler.reset()
    report = bench_model(runner, BenchPlan(prompt_lengths=(8,), new_tokens=4, repeats=2))
    (step,), (first,) = report.decodes, report.prefills
    assert (step.compile_s or 0) > 5 * max(step.step_s)
    assert (first.compile_s or 0) > 5 * max(first.prefill_s)
    assert step.kernels == first.kernels == {"reference": 15}
    assert step.step_bytes.kv == traffic_of_model(model).kv_nbytes(1, 12)  # all of the cache: it is short
    assert [record.protocol.params["compile"] for record in report.records(SUBJECT, capture(threads=1))] == [True, True]


def test_recorded_steps_choose_the_same_tokens(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    real = decode._greedy

    def spy(logits: Tensor) -> Tensor:
        token = real(logits)
        chosen.append(int(token))
        return token

    monkeypatch.setattr(decode, "_greedy", spy)
    report = bench_model(GraphLlama(model, Again()), BenchPlan(prompt_lengths=(8,), new_tokens=4, repeats=1))
    prompt = torch.randint(96, (1, 8), generator=torch.Generator().manual_seed(0))[0].tolist()
    assert chosen[-4:] == list(generate(model, prompt, max_new_tokens=5, stop=()))[1:]
    assert report.decodes[0].kernels == {PLAIN: 15}
    assert report.decodes[0].compile_s is None
