"""The timing loop with a clock that the test turns, so that every expected number is exact."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from llmq.benchmark import timing
from llmq.benchmark.timing import (
    CudaStopwatch,
    HostStopwatch,
    TimingPlan,
    compare_calls,
    stopwatch_for,
    thread_count,
    time_rounds,
)
from llmq.errors import UsageError


class FakeClock:
    """Stands still, except when a call takes its time."""

    def __init__(self) -> None:
        self.now_ns = 1_000
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now_ns

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """Return a call that takes `seconds` one after the other, and then the last of them for ever."""
        durations = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now_ns += round((durations.pop(0) if len(durations) > 1 else durations[0]) * 1e9)

        return run


def test_each_call_is_timed_alone_in_interleaved_order() -> None:
    clock = FakeClock()
    samples = time_rounds(
        {"a": clock.call("a", 9.0, 1.0, 2.0, 3.0), "b": clock.call("b", 9.0, 0.25)},
        TimingPlan(repeats=3, warmup=1),
        stopwatch=HostStopwatch(clock),
    )
    assert samples == {"a": [1.0, 2.0, 3.0], "b": [0.25, 0.25, 0.25]}
    assert clock.log == ["a", "b"] * 4


def test_what_happens_between_rounds_is_not_timed() -> None:
    clock = FakeClock()
    rounds = []

    def on_round() -> None:
        rounds.append(clock.now_ns)
        clock.now_ns += 5_000_000_000

    samples = time_rounds(
        {"a": clock.call("a", 1.0)}, TimingPlan(repeats=4, warmup=0), stopwatch=HostStopwatch(clock), on_round=on_round
    )
    assert samples == {"a": [1.0] * 4}
    assert len(rounds) == 4


def test_budget_ends_the_run_before_it_is_passed() -> None:
    clock = FakeClock()
    plan = TimingPlan(repeats=100, warmup=1, budget_s=10.0, min_repeats=3)
    samples = time_rounds({"a": clock.call("a", 2.0)}, plan, stopwatch=HostStopwatch(clock))
    assert len(samples["a"]) == 4  # with the warm-up, 10 s


def test_budget_never_cuts_below_the_minimum_and_shortens_the_warm_up() -> None:
    clock = FakeClock()
    plan = TimingPlan(repeats=100, warmup=5, budget_s=1.0, min_repeats=3)
    samples = time_rounds({"a": clock.call("a", 2.0)}, plan, stopwatch=HostStopwatch(clock))
    assert len(samples["a"]) == 3
    assert len(clock.log) == 4


def test_the_host_clock_is_monotonic_and_fine() -> None:
    samples = time_rounds({"nothing": lambda: None}, TimingPlan(repeats=20))["nothing"]
    assert len(samples) == 20
    assert all(0 <= sample < 0.1 for sample in samples)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was_found(was_enabled: bool) -> None:
    before = gc.isenabled()
    seen = []
    try:
        (gc.enable if was_enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            time_rounds({"a": lambda: seen.append(gc.isenabled()), "b": lambda: 1 / 0}, TimingPlan(repeats=1, warmup=0))
        assert seen == [False]
        assert gc.isenabled() is was_enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_difference_is_told_from_the_noise_floor() -> None:
    clock = FakeClock()
    drift = [1.0, 1.5, 2.0, 1.2, 1.1, 3.0, 1.0, 2.0]
    # a round is: baseline, slower, equal, baseline; all of one round share the machine's mood
    slower = clock.call("slower", *[2 * mood for mood in drift])
    equal = clock.call("equal", *drift)
    compared = compare_calls(
        clock.call("baseline", *[mood for mood in drift for _ in range(2)]),
        {"slower": slower, "equal": equal},
        TimingPlan(repeats=len(drift), warmup=0),
        stopwatch=HostStopwatch(clock),
    )
    assert compared["slower"].ratio.median == pytest.approx(2.0)
    assert compared["slower"].differs
    assert compared["equal"].ratio.median == pytest.approx(1.0)
    assert not compared["equal"].differs
    assert compared["slower"].noise_floor.interval == pytest.approx((1.0, 1.0))
    assert clock.log[:4] == ["baseline", "slower", "equal", "baseline"]


def test_comparison_refuses_a_name_that_it_needs() -> None:
    with pytest.raises(UsageError, match="cannot be named 'baseline'"):
        compare_calls(lambda: None, {"baseline": lambda: None}, TimingPlan())


@pytest.mark.parametrize(
    "bad", [{"repeats": 0}, {"warmup": -1}, {"min_repeats": 0}, {"budget_s": 0.0}], ids=["repeats", "warmup", "minimum", "budget"]
)
def test_a_plan_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        TimingPlan(**bad)  # type: ignore[arg-type]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to time"):
        time_rounds({}, TimingPlan())


def test_cuda_events_are_read_after_the_last_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = {"now_ms": 0.0, "reached_ms": -1.0}

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = stream["now_ms"]

        def synchronize(self) -> None:
            stream["reached_ms"] = self.at_ms

        def elapsed_time(self, end: Event) -> float:
            assert stream["reached_ms"] >= end.at_ms, "read before the device got there"
            return end.at_ms - self.at_ms

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    watch = stopwatch_for("cuda:0")
    assert isinstance(watch, CudaStopwatch)

    def takes(milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            stream["now_ms"] += milliseconds

        return run

    samples = time_rounds({"a": takes(1.5), "b": takes(4.0)}, TimingPlan(repeats=2, warmup=1), stopwatch=watch)
    assert samples == {"a": [0.0015] * 2, "b": [0.004] * 2}
    assert watch.split() == []


def test_cpu_devices_get_the_host_clock() -> None:
    assert isinstance(stopwatch_for("cpu"), HostStopwatch)


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    seen = []

    def fail() -> None:
        with thread_count(1) as threads:
            seen.append((threads, torch.get_num_threads()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [(1, 1)]
    assert torch.get_num_threads() == before
    with thread_count(None) as threads:
        assert threads == before


def test_no_threads_are_refused() -> None:
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"), thread_count(0):
        pass
