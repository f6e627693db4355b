"""The one timing loop of llmq: warm up, then rounds in which every call runs once and is timed alone.

Everything that is timed goes through `time_rounds`. One round runs the calls in their order, with a mark of a monotonic
nanosecond clock (on CUDA: an event in the stream) between any two. That one shape serves three purposes:

* one call, many rounds: the plain benchmark;
* the phases of one operation (prefill, then the first token), timed apart but run together;
* candidates against a baseline, A B A B …, so that drift of the machine hits all alike and ratios are taken pair by pair.

Raw samples come back, never an average; `order_statistics.py` says what they mean. Python's garbage collector is held off while
rounds run, as a collection would land on a call at random.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from llmq.benchmark.order_statistics import Summary, paired_ratios, summarize
from llmq.errors import UsageError

Call = Callable[[], object]


class Stopwatch(Protocol):
    """Marks points in time; `split` turns them into the seconds between each two, and forgets them."""

    def mark(self) -> None:
        """Mark this moment."""
        ...

    def split(self) -> list[float]:
        """Return the seconds between consecutive marks since the last split, after everything marked has really ended."""
        ...


class HostStopwatch:
    """The host's monotonic clock: right for work that is over when the call returns."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._marks_ns: list[int] = []

    def mark(self) -> None:
        """See `Stopwatch.mark`."""
        self._marks_ns.append(self._clock())

    def split(self) -> list[float]:
        """See `Stopwatch.split`."""
        marks, self._marks_ns = self._marks_ns, []
        return [(after - before) / 1e9 for before, after in pairwise(marks)]


class CudaStopwatch:
    """Events in the current CUDA stream: what the device took, whatever the host did meanwhile."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """See `Stopwatch.mark`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def split(self) -> list[float]:
        """See `Stopwatch.split`."""
        events, self._events = self._events, []
        if events:
            events[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def stopwatch_for(device: torch.device | str) -> Stopwatch:
    """Return the stopwatch that is right for work on `device`."""
    return CudaStopwatch() if torch.device(device).type == "cuda" else HostStopwatch()


@dataclass(frozen=True, slots=True)
class TimingPlan:
    """How often to run.

    `repeats` rounds are timed after `warmup` rounds that are not. With a `budget_s`, timing ends early when the next round
    would pass that many seconds of measured time (warm-up included), but never before `min_repeats` rounds; a warm-up ends
    early, after its first round, when it has used a quarter of the budget.
    """

    repeats: int = 10
    warmup: int = 2
    budget_s: float | None = None
    min_repeats: int = 3

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.min_repeats < 1 or self.warmup < 0:
            raise UsageError(
                f"timing needs repeats >= 1, min_repeats >= 1 and warmup >= 0, "
                f"got {self.repeats}, {self.min_repeats} and {self.warmup}."
            )
        if self.budget_s is not None and self.budget_s <= 0:
            raise UsageError(f"a time budget must be positive seconds or None (no limit), got {self.budget_s}.")


def time_rounds(
    calls: Mapping[str, Call],
    plan: TimingPlan,
    *,
    stopwatch: Stopwatch | None = None,
    on_round: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Run every call once a round, in order, and return each one's seconds, one sample a timed round.

    Args:
        calls: what to time, by name; a round runs them in this order.
        plan: how many rounds.
        stopwatch: default is the host's clock; pass `stopwatch_for(device)`.
        on_round: called after each timed round, outside of what is timed.

    Raises:
        UsageError: there is nothing to time.
    """
    if not calls:
        raise UsageError("there is nothing to time: no call was given.")
    watch = HostStopwatch() if stopwatch is None else stopwatch
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent_s = 0.0
    with _garbage_collection_held_off():
        for index in range(plan.warmup):
            if index and plan.budget_s is not None and spent_s > plan.budget_s / 4:
                break
            spent_s += sum(_round(calls, watch))
        for index in range(plan.repeats):
            seconds = _round(calls, watch)
            for name, sample in zip(calls, seconds, strict=True):
                samples[name].append(sample)
            if on_round is not None:
                on_round()
            spent_s += sum(seconds)
            over = plan.budget_s is not None and spent_s + sum(seconds) > plan.budget_s
            if over and index + 1 >= plan.min_repeats:
                break
    return samples


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate's time as a share of the baseline's, pair by pair; below 1 is faster."""

    ratio: Summary
    noise_floor: Summary
    """The same ratio of the baseline against itself, in the same rounds: what no difference looks like on this machine."""

    @property
    def differs(self) -> bool:
        """Whether the ratio's interval lies outside of the noise floor's; both reach 95 % from 6 rounds on."""
        return self.ratio.interval[0] > self.noise_floor.interval[1] or self.ratio.interval[1] < self.noise_floor.interval[0]


def compare_calls(
    baseline: Call, candidates: Mapping[str, Call], plan: TimingPlan, *, stopwatch: Stopwatch | None = None
) -> dict[str, Comparison]:
    """Time candidates against a baseline in interleaved rounds: A, each candidate, and A once more for the noise floor."""
    first, again = "baseline", "baseline again"
    clash = {first, again} & set(candidates)
    if clash:
        raise UsageError(f"a candidate cannot be named {sorted(clash)[0]!r}; choose another name.")
    samples = time_rounds({first: baseline, **candidates, again: baseline}, plan, stopwatch=stopwatch)
    floor = summarize(paired_ratios(samples[again], samples[first]))
    return {name: Comparison(summarize(paired_ratios(samples[name], samples[first])), floor) for name in candidates}


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Let torch use `threads` CPU threads (None: as many as it already uses) inside the block; yields their number.

    Raises:
        UsageError: `threads` is not positive.
    """
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}.")
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _round(calls: Mapping[str, Call], watch: Stopwatch) -> list[float]:
    watch.mark()
    for call in calls.values():
        call()
        watch.mark()
    return watch.split()


@contextmanager
def _garbage_collection_held_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
