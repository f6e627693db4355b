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
TPOT is a median too. Under `compile` every step has the same shapes, and reads the whole cache of C + new_tokens tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn

from llmq.benchmark.machine import Bandwidth
from llmq.benchmark.memory import peak_memory
from llmq.benchmark.speed import BenchPlan, DecodeResult, PrefillResult, SpeedReport
from llmq.benchmark.timing import TimingPlan, stopwatch_for, thread_count, time_rounds
from llmq.benchmark.traffic import HEAD, Traffic, traffic_of_model
from llmq.errors import KernelError
from llmq.model.generate import decode_step, prefill
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import record_usage
from llmq.progress import SILENT, Progress

PLAIN = "torch"
"""Name under which linears are counted whose weight is a plain tensor: `F.linear` runs them."""

Prefill = Callable[[Llama, KVCache, Tensor], Tensor]
DecodeStep = Callable[[Llama, KVCache, Tensor, int | Tensor], Tensor]


def bench_model(
    model: Llama,
    plan: BenchPlan,
    *,
    threads: int | None = None,
    bandwidth: Bandwidth | None = None,
    progress: Progress = SILENT,
) -> SpeedReport:
    """Measure prefill and decode of a model that is ready to run, for every combination that `plan` asks for.

    Args:
        model: in its dtype, on its device, its kernels chosen.
        plan: what to run.
        threads: CPU threads (None: as many as torch uses now); restored afterwards.
        bandwidth: what the machine can read, from `machine.measured_bandwidth` of the same device and threads; None: shares of
            it are not reported.
        progress: is told of every length of every batch size.

    Raises:
        UsageError: a prompt or context does not fit into the model's context.
        KernelError: `plan.compile`, and torch.compile fails.
    """
    plan.check(model.config.max_position_embeddings)
    traffic = traffic_of_model(model)
    prefills: list[PrefillResult] = []
    decodes: list[DecodeResult] = []
    lengths = plan.lengths
    with (
        torch.no_grad(),
        thread_count(threads) as used,
        progress.task("tokens per second", len(plan.batch_sizes) * len(lengths)) as advance,
    ):
        for batch_size in plan.batch_sizes:
            for length in lengths:
                case = _Case(model, plan, traffic, batch_size, length, bandwidth)
                if length in plan.prompt_lengths:
                    prefills.append(case.time_prefill())
                if length in plan.decode_contexts:
                    decodes.append(case.time_decode())
                advance(1)
    return SpeedReport(tuple(prefills), tuple(decodes), plan, used, model_nbytes(model))


class _Case:
    """One batch size and one length: of a prompt, and of what is in the cache when decoding begins."""

    def __init__(
        self, model: Llama, plan: BenchPlan, traffic: Traffic, batch_size: int, length: int, bandwidth: Bandwidth | None
    ) -> None:
        self.model, self.plan, self.traffic, self.bandwidth = model, plan, traffic, bandwidth
        self.batch_size, self.length = batch_size, length
        self.timing = TimingPlan(plan.repeats, warmup=1, budget_s=plan.budget_s)
        generator = torch.Generator().manual_seed(plan.seed)
        shape = (batch_size, length)
        self.prompt = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
        room = plan.new_tokens if length in plan.decode_contexts else 0
        self.cache = KVCache(model.config, batch_size, length + room, model.dtype, model.device)
        self.prefill: Prefill = prefill
        self.decode_step: DecodeStep = decode_step
        if plan.compile:
            # A graph is specialised for one shape. Without the reset, a list of shapes would end in torch's limit of graphs
            # for one function.
            torch.compiler.reset()
            self.prefill = torch.compile(prefill, fullgraph=True, dynamic=False)
            self.decode_step = torch.compile(decode_step, fullgraph=True, dynamic=False)

    def time_prefill(self) -> PrefillResult:
        """Time the prompt's prefill, and taking the first token."""
        state = {"logits": self._fill()}

        def run() -> None:
            state["logits"] = self.prefill(self.model, self.cache, self.prompt)

        def first_token() -> Tensor:
            return _greedy(state["logits"])

        calls = {"prefill": run, "first token": first_token}
        with peak_memory(self.model.device) as memory:
            kernels, compile_s = self._settle(run, "prefill", self.length)
            samples = time_rounds(calls, self.timing, stopwatch=stopwatch_for(self.model.device))
        return PrefillResult(
            batch_size=self.batch_size,
            prompt_length=self.length,
            prefill_s=tuple(samples["prefill"]),
            ttft_s=tuple(a + b for a, b in zip(samples["prefill"], samples["first token"], strict=True)),
            flops=self.traffic.prefill_flops(self.batch_size, self.length),
            compile_s=compile_s,
            kernels=kernels,
            memory=memory,
        )

    def time_decode(self) -> DecodeResult:
        """Time the steps that follow when the cache holds the context."""
        decoder = _Decoder(self.model, self.cache, self.decode_step, _greedy(self._fill()), self.length, fixed=self.plan.compile)
        steps = [f"step {index}" for index in range(self.plan.new_tokens)]
        calls = {"rewind": decoder.rewind, **dict.fromkeys(steps, decoder.step)}
        with peak_memory(self.model.device) as memory:
            kernels, compile_s = self._settle(decoder.restart_and_step, "decode step", 1)
            samples = time_rounds(calls, self.timing, stopwatch=stopwatch_for(self.model.device))
        tpot_s = tuple(median(samples[step][repeat] for step in steps) for repeat in range(len(samples["rewind"])))
        visible = [self.length + index + 1 for index in range(self.plan.new_tokens)]
        if self.plan.compile:
            visible = [self.cache.max_length]
        middle = sorted(visible)[len(visible) // 2]
        return DecodeResult(
            batch_size=self.batch_size,
            context=self.length,
            new_tokens=self.plan.new_tokens,
            tpot_s=tpot_s,
            step_bytes=self.traffic.decode_bytes(self.batch_size, middle),
            bandwidth=self.bandwidth,
            compile_s=compile_s,
            kernels=kernels,
            memory=memory,
        )

    def _fill(self) -> Tensor:
        """Put the prompt into the cache; returns the logits of its last token."""
        return prefill(self.model, self.cache, self.prompt)

    def _settle(self, call: Callable[[], object], what: str, length: int) -> tuple[dict[str, int], float | None]:
        """Run `call` once untimed; return the kernels that it uses and, under compile, the seconds that compiling took."""
        if not self.plan.compile:
            with record_usage() as usage:
                call()
            plain = sum(1 for _ in _plain_linears(self.model))
            return usage.linears() | ({PLAIN: plain} if plain else {}), None
        try:
            seconds = time_rounds({what: call}, TimingPlan(repeats=1, warmup=0, min_repeats=1))[what][0]
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise KernelError(f"torch.compile cannot compile the {what}: {reason}; leave --compile out.") from error
        return planned_kernels(self.model, self.batch_size, length), seconds


class _Decoder:
    """Greedy decoding that can be taken back to where it began, so that it can be repeated."""

    def __init__(self, model: Llama, cache: KVCache, step: DecodeStep, first: Tensor, context: int, *, fixed: bool) -> None:
        self._model, self._cache, self._step = model, cache, step
        self._first, self._context = first, context
        self._where = torch.tensor([context], device=model.device) if fixed else None
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first token after the context."""
        self._tokens, self._position = self._first, self._context
        if self._where is not None:
            self._where.fill_(self._context)

    def step(self) -> None:
        """Decode one token of every sequence, and choose the next."""
        position = self._position if self._where is None else self._where
        self._tokens = _greedy(self._step(self._model, self._cache, self._tokens, position))
        self._position += 1
        if self._where is not None:
            self._where += 1

    def restart_and_step(self) -> None:
        """Decode the first token once more."""
        self.rewind()
        self.step()


def planned_kernels(model: Llama, batch_size: int, length: int) -> dict[str, int]:
    """Return, for a call on [batch_size, length] tokens that needs the last token's logits, kernel -> number of linears."""
    counts = Counter({PLAIN: sum(1 for _ in _plain_linears(model))})
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantizedTensor):
            counts[module.weight.pick(batch_size if fqn == HEAD else batch_size * length).name] += 1
    return {name: count for name, count in counts.items() if count}


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
