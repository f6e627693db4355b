"""What a benchmark of prefill and decode is asked, and what it answers, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmq.benchmark.machine import Bandwidth
from llmq.benchmark.memory import PeakMemory
from llmq.benchmark.order_statistics import median, summarize
from llmq.benchmark.traffic import StepBytes
from llmq.errors import UsageError
from llmq.results.binning import histogram
from llmq.results.record import Details, Environment, Kind, Metric, Protocol, ResultRecord, Subject

PROTOCOL_VERSION = 1
"""Raised when the meaning of a figure of `prefill` or `decode` records changes."""
_BINS = 40
"""Of a histogram of step times, between 1 and 10: 6 % wide each."""


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to run.

    Attributes:
        batch_sizes: sequences that run together; every length is run for each.
        prompt_lengths: tokens of the prompts whose prefill is timed.
        contexts: tokens in the cache where decoding is timed from; None: the prompt lengths.
        new_tokens: steps of one repeat of decoding.
        repeats: timed repeats, after one that is not.
        seed: of the random prompts.
        budget_s: end a timing early (after 3 repeats at the least) when it would take longer; None: never.
    """

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    contexts: tuple[int, ...] | None = None
    new_tokens: int = 64
    repeats: int = 5
    seed: int = 0
    budget_s: float | None = None

    @property
    def decode_contexts(self) -> tuple[int, ...]:
        """Contexts that decoding is timed at."""
        return self.prompt_lengths if self.contexts is None else self.contexts

    @property
    def lengths(self) -> tuple[int, ...]:
        """Prompt lengths and contexts, each once, in the order given."""
        return tuple(dict.fromkeys((*self.prompt_lengths, *self.decode_contexts)))

    def check(self, limit: int) -> None:
        """Raise UsageError when this cannot be run on a model whose context is `limit` tokens."""
        for name, values in (("batch sizes", self.batch_sizes), ("lengths", self.lengths)):
            if not values or min(values) < 1:
                raise UsageError(f"{name} must be positive numbers, at least one of them; got {list(values)}.")
        if self.new_tokens < 1:
            raise UsageError(f"new_tokens must be at least 1, got {self.new_tokens}.")
        for length in self.prompt_lengths:
            if length > limit:
                raise UsageError(f"a prompt of {length} tokens is beyond the model's context of {limit}; use at most {limit}.")
        for context in self.decode_contexts:
            if context + self.new_tokens > limit:
                raise UsageError(
                    f"{self.new_tokens} new tokens after a context of {context} are beyond the model's context of {limit} "
                    f"tokens; use a context of at most {limit - self.new_tokens}, or fewer new tokens."
                )


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """One batch size and prompt length. `prefill_s` and `ttft_s` hold one sample a repeat."""

    batch_size: int
    prompt_length: int
    prefill_s: tuple[float, ...]
    ttft_s: tuple[float, ...]
    flops: int
    compile_s: float | None
    kernels: dict[str, int]
    memory: PeakMemory

    @property
    def details(self) -> Details:
        """Nothing: repeats are few, and the samples of the metrics."""
        return Details()

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens of all sequences over the median time of a prefill."""
        return self.batch_size * self.prompt_length / median(self.prefill_s)

    @property
    def gflops(self) -> float:
        """10⁹ multiplications and additions a second."""
        return self.flops / median(self.prefill_s) / 1e9

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of a `prefill` record."""
        tokens = self.batch_size * self.prompt_length
        return {
            "tokens_per_s": rate_metric(self.prefill_s, tokens, "tokens/s"),
            "ttft_s": time_metric(self.ttft_s),
            "prefill_s": time_metric(self.prefill_s),
            "gflops": rate_metric(self.prefill_s, self.flops / 1e9, "GFLOP/s", keep_samples=False),
            **_shared_metrics(self.compile_s, self.memory),
        }

    def protocol(self) -> Protocol:
        """Return how it was measured."""
        params = {"batch_size": self.batch_size, "prompt_length": self.prompt_length, "compile": self.compile_s is not None}
        return Protocol(name="prefill", version=PROTOCOL_VERSION, params=params)


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """One batch size and context. `tpot_s` holds, for each repeat, the median time of its steps."""

    batch_size: int
    context: int
    new_tokens: int
    tpot_s: tuple[float, ...]
    step_bytes: StepBytes
    """What a run's middle step reads."""
    bandwidth: Bandwidth | None
    """What the machine can read; None where nobody measured it."""
    compile_s: float | None
    kernels: dict[str, int]
    memory: PeakMemory
    step_s: tuple[float, ...] = ()
    """Every timed step of every repeat."""

    @property
    def details(self) -> Details:
        """How the times of single steps are spread."""
        return Details(histograms={"step_s": histogram(self.step_s, "s", per_decade=_BINS)} if self.step_s else {})

    @property
    def median_tpot_s(self) -> float:
        """Median time per output token: of one step, in which every sequence gets one."""
        return median(self.tpot_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences a second: batch size / TPOT."""
        return self.batch_size / self.median_tpot_s

    @property
    def achieved_gbps(self) -> float:
        """Bytes that a step must read over the time it takes, in GB/s (10⁹ bytes)."""
        return self.step_bytes.total / self.median_tpot_s / 1e9

    @property
    def bandwidth_share(self) -> float | None:
        """Achieved over measured bandwidth (MBU); None where the latter is not known."""
        return None if self.bandwidth is None else self.achieved_gbps / self.bandwidth.best_gbps

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of a `decode` record."""
        total = self.step_bytes.total
        found = {
            "tokens_per_s": rate_metric(self.tpot_s, self.batch_size, "tokens/s"),
            "tpot_s": time_metric(self.tpot_s),
            "bytes_per_step": Metric(value=total, unit="bytes"),
            "kv_bytes_per_step": Metric(value=self.step_bytes.kv, unit="bytes"),
            "bandwidth_gbps": rate_metric(self.tpot_s, total / 1e9, "GB/s", keep_samples=False),
        }
        if self.bandwidth is not None:
            share = total / 1e9 / self.bandwidth.best_gbps
            found["bandwidth_share"] = rate_metric(self.tpot_s, share, "1", keep_samples=False)
            found["machine_bandwidth_gbps"] = Metric(value=self.bandwidth.best_gbps, unit="GB/s")
        return found | _shared_metrics(self.compile_s, self.memory)

    def protocol(self) -> Protocol:
        """Return how it was measured."""
        params = {
            "batch_size": self.batch_size,
            "context": self.context,
            "new_tokens": self.new_tokens,
            "compile": self.compile_s is not None,
        }
        return Protocol(name="decode", version=PROTOCOL_VERSION, params=params)


@dataclass(frozen=True)
class SpeedReport:
    """Everything that one `bench_model` call measured."""

    prefills: tuple[PrefillResult, ...]
    decodes: tuple[DecodeResult, ...]
    plan: BenchPlan
    threads: int
    model_nbytes: int
    """Bytes that the model's parameters store, as they are laid out for its kernels."""
    together: int = 1
    """How many models were measured in turns, all of them in memory."""

    def records(self, subject: Subject, environment: Environment, *, notes: Sequence[str] = ()) -> list[ResultRecord]:
        """Return one record a prefill and one a decode, all of `subject`, with `notes` and what else has to be said."""
        own = {"model_bytes": Metric(value=self.model_nbytes, unit="bytes")}
        kinds: tuple[tuple[Kind, Sequence[PrefillResult | DecodeResult]], ...] = (
            ("prefill", self.prefills),
            ("decode", self.decodes),
        )
        return [
            ResultRecord(
                kind=kind,
                subject=subject,
                protocol=result.protocol(),
                metrics=result.metrics() | own,
                kernels=result.kernels,
                environment=environment,
                notes=[*notes, *self._notes(result)],
                details=result.details,
            )
            for kind, results in kinds
            for result in results
        ]

    def _notes(self, result: PrefillResult | DecodeResult) -> list[str]:
        notes = []
        if self.together > 1:
            notes.append(
                f"speed was measured in turns with all {self.together} models in memory; peak memory is theirs together."
            )
        if result.memory.since == "process":
            notes.append("peak memory is that of the whole process, as this system does not let a run start its own count.")
        return notes


def time_metric(seconds: Sequence[float]) -> Metric:
    """Return the median of samples in seconds, with its standard error."""
    found = summarize(seconds)
    return Metric(value=found.median, unit="s", stderr=found.stderr, samples=list(seconds))


def rate_metric(seconds: Sequence[float], amount: float, unit: str, *, keep_samples: bool = True) -> Metric:
    """Return `amount` / the median of `seconds`, with the standard error of the median of the rates."""
    rates = [amount / sample for sample in seconds]
    return Metric(
        value=amount / median(seconds), unit=unit, stderr=summarize(rates).stderr, samples=rates if keep_samples else None
    )


def _shared_metrics(compile_s: float | None, memory: PeakMemory) -> dict[str, Metric]:
    found = {"peak_memory_bytes": Metric(value=memory.nbytes, unit="bytes")}
    if compile_s is not None:
        found["compile_s"] = Metric(value=compile_s, unit="s")
    return found
