"""Prefill and decode, measured apart, because different walls stop them.

A prefill multiplies every weight with all tokens of the prompt: it is bound by arithmetic. A decode step reads every weight
for one token a sequence: it is bound by memory, and has a floor in seconds of its bytes over the machine's bandwidth.

For each batch size B:

    prefill, at each prompt length T     one call on [B, T] random tokens, logits of the last token only; then the first token
                                         is taken (greedy). tokens/s is B T / prefill; TTFT is prefill + first token.
    decode, at each context C            the cache holds C tokens; then `new_tokens` greedy steps follow, each timed, each fed
                                         what the one before chose. One repeat's TPOT is the median of its steps; TPOT is the
                                         median over the repeats, and their spread its error. tokens/s is B / TPOT.

A step at position p reads p + 1 tokens of the cache, so the bytes of a run's steps differ; the middle one's are reported, as
TPOT is a median too. Runtimes whose steps have static shapes read more, and are counted with what they read (`model.stepped`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from llmq.benchmark.machine import Bandwidth
from llmq.benchmark.memory import peak_memory
from llmq.benchmark.speed import BenchPlan, DecodeResult, PrefillResult, SpeedReport
from llmq.benchmark.timing import Call, TimingPlan, stopwatch_for, thread_count, time_rounds
from llmq.benchmark.traffic import Traffic, traffic_of_model
from llmq.model.compiled import CompiledLlama
from llmq.model.generate import decode_step, prefill
from llmq.model.kv_cache import KVCache
from llmq.model.runtime import ModelRunner, weights_of
from llmq.model.stepped import SteppedLlama
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import record_usage
from llmq.progress import SILENT, Progress

PLAIN = "torch"
"""Name under which linears are counted whose weight is a plain tensor: `F.linear` runs them."""


def bench_model(
    model: ModelRunner,
    plan: BenchPlan,
    *,
    kv_dtype: torch.dtype | None = None,
    threads: int | None = None,
    bandwidth: Bandwidth | None = None,
    progress: Progress = SILENT,
) -> SpeedReport:
    """Measure prefill and decode of a model that is ready to run, for every combination that `plan` asks for.

    Args:
        model: in its dtype, on its device, its kernels chosen; what runs it is what is measured.
        plan: what to run.
        kv_dtype: of the KV cache; None: the model's.
        threads: CPU threads (None: as many as torch uses now); restored afterwards.
        bandwidth: what the machine can read, from `machine.measured_bandwidth` of the same device and threads; None: shares of
            it are not reported.
        progress: is told of every length of every batch size.

    Raises:
        UsageError: a prompt or context does not fit into the model's context.
        KernelError: the model is to be compiled or recorded, and cannot.
    """
    return bench_models([model], plan, kv_dtypes=[kv_dtype], threads=threads, bandwidth=bandwidth, progress=progress)[0]


def bench_models(
    models: Sequence[ModelRunner],
    plan: BenchPlan,
    *,
    kv_dtypes: Sequence[torch.dtype | None] | None = None,
    threads: int | None = None,
    bandwidth: Bandwidth | None = None,
    progress: Progress = SILENT,
) -> list[SpeedReport]:
    """Measure several models in the same rounds, A B C A B C …, so that a drift of the machine's speed meets all alike.

    One turn of a model is a whole prefill, or a whole run of `new_tokens` steps. Arguments and errors are those of
    `bench_model`, with a dtype of the KV cache for each model; the same model may come twice, with different caches.

    Returns:
        One report a model, in their order. Peak memory is that of all models together, and the reports say so.
    """
    caches = kv_dtypes or [None] * len(models)
    for model in models:
        plan.check(model.config.max_position_embeddings)
    traffics = [traffic_of_model(weights_of(model), kv_dtype) for model, kv_dtype in zip(models, caches, strict=True)]
    prefills: list[list[PrefillResult]] = [[] for _ in models]
    decodes: list[list[DecodeResult]] = [[] for _ in models]
    lengths = plan.lengths
    with (
        torch.no_grad(),
        thread_count(threads) as used,
        progress.task("measuring speed", len(plan.batch_sizes) * len(lengths)) as advance,
    ):
        for batch_size in plan.batch_sizes:
            for length in lengths:
                cases = [_Case(*each, plan, batch_size, length) for each in zip(models, traffics, strict=True)]
                if length in plan.prompt_lengths:
                    for found, result in zip(prefills, _time_prefills(cases, plan), strict=True):
                        found.append(result)
                if length in plan.decode_contexts:
                    for steps, step in zip(decodes, _time_decodes(cases, plan, bandwidth), strict=True):
                        steps.append(step)
                advance(1)
    together = len({id(weights_of(model)) for model in models})
    return [
        SpeedReport(tuple(prefills[index]), tuple(decodes[index]), plan, used, model_nbytes(weights_of(model)), together)
        for index, model in enumerate(models)
    ]


class _Case:
    """One model, batch size and length: of a prompt, and of what is in the cache when decoding begins."""

    def __init__(self, model: ModelRunner, traffic: Traffic, plan: BenchPlan, batch_size: int, length: int) -> None:
        self.model, self.traffic = model, traffic
        self.batch_size, self.length = batch_size, length
        generator = torch.Generator().manual_seed(plan.seed)
        shape = (batch_size, length)
        self.prompt = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
        room = plan.new_tokens if length in plan.decode_contexts else 0
        self.cache = KVCache(model.config, batch_size, length + room, traffic.kv_dtype, model.device)
        self.logits: Tensor | None = None

    def run_prefill(self) -> None:
        """Put the prompt into the cache; keep the logits of its last token."""
        self.logits = prefill(self.model, self.cache, self.prompt)

    def first_token(self) -> Tensor:
        """Return the token that follows the prompt, int64 [B, 1]."""
        assert self.logits is not None
        return _greedy(self.logits)

    def settle(self, call: Callable[[], object]) -> tuple[dict[str, int], float | None]:
        """Run `call` once before anything counts; return the kernels that it uses and, where it compiles, its seconds."""
        with record_usage() as usage:
            seconds = time_rounds({"first": call}, TimingPlan(repeats=1, warmup=0, min_repeats=1))["first"][0]
        plain = sum(1 for _ in _plain_linears(weights_of(self.model)))
        return usage.linears() | ({PLAIN: plain} if plain else {}), seconds if isinstance(self.model, CompiledLlama) else None


def _time_prefills(cases: Sequence[_Case], plan: BenchPlan) -> list[PrefillResult]:
    """Time each model's prefill of the prompt, and taking the first token."""
    with peak_memory(cases[0].model.device) as memory:
        settled = [case.settle(case.run_prefill) for case in cases]
        turns: list[dict[str, Call]] = [{"prefill": case.run_prefill, "first token": case.first_token} for case in cases]
        timed = _in_turns(turns, plan, cases[0].model.device)
    return [
        PrefillResult(
            batch_size=case.batch_size,
            prompt_length=case.length,
            prefill_s=tuple(samples["prefill"]),
            ttft_s=tuple(a + b for a, b in zip(samples["prefill"], samples["first token"], strict=True)),
            flops=case.traffic.prefill_flops(case.batch_size, case.length),
            compile_s=compile_s,
            kernels=kernels,
            memory=memory,
        )
        for case, (kernels, compile_s), samples in zip(cases, settled, timed, strict=True)
    ]


def _time_decodes(cases: Sequence[_Case], plan: BenchPlan, bandwidth: Bandwidth | None) -> list[DecodeResult]:
    """Time the steps that follow when the caches hold the context."""
    steps = [f"step {index}" for index in range(plan.new_tokens)]
    decoders = [_Decoder(case) for case in cases]
    with peak_memory(cases[0].model.device) as memory:
        settled = [case.settle(decoder.restart_and_step) for case, decoder in zip(cases, decoders, strict=True)]
        turns: list[dict[str, Call]] = [{"rewind": decoder.rewind, **dict.fromkeys(steps, decoder.step)} for decoder in decoders]
        timed = _in_turns(turns, plan, cases[0].model.device)
    return [
        DecodeResult(
            batch_size=case.batch_size,
            context=case.length,
            new_tokens=plan.new_tokens,
            tpot_s=tuple(median(samples[step][repeat] for step in steps) for repeat in range(len(samples["rewind"]))),
            step_bytes=case.traffic.decode_bytes(case.batch_size, _middle_visible(case, plan)),
            bandwidth=bandwidth,
            compile_s=compile_s,
            kernels=kernels,
            memory=memory,
            step_s=tuple(time for step in steps for time in samples[step]),
        )
        for case, (kernels, compile_s), samples in zip(cases, settled, timed, strict=True)
    ]


def _in_turns(turns: Sequence[dict[str, Call]], plan: BenchPlan, device: torch.device) -> list[dict[str, list[float]]]:
    """Time rounds in which each model has its turn; returns the samples of each turn's calls."""
    budget_s = None if plan.budget_s is None else plan.budget_s * len(turns)
    timing = TimingPlan(plan.repeats, warmup=1, budget_s=budget_s)
    calls = {f"{index} {name}": call for index, turn in enumerate(turns) for name, call in turn.items()}
    samples = time_rounds(calls, timing, stopwatch=stopwatch_for(device))
    return [{name: samples[f"{index} {name}"] for name in turn} for index, turn in enumerate(turns)]


def _middle_visible(case: _Case, plan: BenchPlan) -> int:
    """Return how many tokens of the cache a run's middle step reads."""
    position = case.length + plan.new_tokens // 2
    return case.model.reads(case.cache, position) if isinstance(case.model, SteppedLlama) else position + 1


class _Decoder:
    """Greedy decoding after a case's prompt, that can be taken back to where it began, so that it can be repeated."""

    def __init__(self, case: _Case) -> None:
        if case.logits is None:  # else the cache holds the prompt already
            case.logits = prefill(case.model, case.cache, case.prompt)
        self._case = case
        self._first = case.first_token()
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first token after the context."""
        self._tokens, self._position = self._first, self._case.length

    def step(self) -> None:
        """Decode one token of every sequence, and choose the next."""
        case = self._case
        self._tokens = _greedy(decode_step(case.model, case.cache, self._tokens, self._position))
        self._position += 1

    def restart_and_step(self) -> None:
        """Decode the first token once more."""
        self.rewind()
        self.step()


def model_nbytes(model: nn.Module) -> int:
    """Bytes that all parameters of a model store; memory that several share is counted once."""
    storages = {}
    for parameter in model.parameters():
        parts = parameter.stored if isinstance(parameter, QuantizedTensor) else (parameter,)
        for part in parts:
            storages[part.data_ptr()] = part.numel() * part.element_size()
    return sum(storages.values())


def _greedy(logits: Tensor) -> Tensor:
    """Return the most likely token of the last position, int64 [B, 1], of logits [B, T, V]."""
    return logits[:, -1].argmax(-1, keepdim=True)


def _plain_linears(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module.weight, QuantizedTensor):
            yield module
