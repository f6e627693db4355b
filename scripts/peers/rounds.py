"""The measurement: all workers of one bit width loaded, then rounds in which each does everything once.

In a round each operation is run by every engine, one after the other, before the next operation begins, so that what is compared
was measured within seconds of each other; the engine that begins moves on by one each round. A round before the first is not
counted. While one runs, the others wait for their next request; the CPU time that they use meanwhile is measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmq.benchmark.order_statistics import median
from peers.workers import UnsupportedError, Worker, WorkerError

LOWEST_CORRELATION = {16: 0.99, 8: 0.95, 4: 0.6}
"""Of the logits with those of the reference, by bits; what is wrongly converted has a correlation near 0."""

SETTLE_S = 0.05
"""Pause before a task: threads of the engine before may spin a little before they sleep."""
SHORT_S, MOST_REPEATS = 0.3, 9
"""A task is repeated until it has taken so long, at most so often; their median is the round's time."""


@dataclass(frozen=True, slots=True)
class Task:
    """One operation as it is timed."""

    name: str
    """Such as 'prefill-512'."""
    request: Mapping[str, Any]
    tokens: int
    """Tokens that `seconds` of the answer (or one of its steps) compute."""

    def seconds(self, answer: Mapping[str, Any]) -> float:
        """Return the seconds of one repeat: the median of its steps where there are several."""
        found = answer["seconds"]
        return float(median(found)) if isinstance(found, list) else float(found)


@dataclass
class Outcome:
    """What one variant did."""

    name: str
    info: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By task, one a round."""
    idle: dict[str, float] = field(default_factory=dict)
    """By task: the others' CPU time over the time it took, summed over the rounds."""
    notes: list[str] = field(default_factory=list)
    check: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    failure: str | None = None


@dataclass
class Measurement:
    """Tasks, rounds and what is told to the user."""

    tasks: list[Task]
    rounds: int
    say: Callable[[str], None]

    def run(self, workers: dict[str, Worker], outcomes: dict[str, Outcome]) -> None:
        """Time all tasks on all workers; a worker that fails is left out from then on, with its reason."""
        totals: dict[tuple[str, str], list[float]] = {}
        for number in range(self.rounds + 1):
            self.say(f"round {number} of {self.rounds}" + (" (not counted)" if number == 0 else ""))
            names = list(workers)
            turn = names[number % len(names) :] + names[: number % len(names)] if names else []
            for task in self.tasks:
                for name in turn:
                    if name not in workers or (number and task.name not in outcomes[name].seconds):
                        continue
                    self.once(task, name, workers, outcomes[name], totals if number else None)
        for (name, task_name), (others, wall) in totals.items():
            outcomes[name].idle[task_name] = others / wall

    def once(
        self,
        task: Task,
        name: str,
        workers: dict[str, Worker],
        outcome: Outcome,
        totals: dict[tuple[str, str], list[float]] | None,
    ) -> None:
        """Run one task on one worker; `totals` None means that it does not count."""
        time.sleep(SETTLE_S)
        others = [worker for other, worker in workers.items() if other != name]
        before, begin = sum(worker.cpu_seconds() for worker in others), time.perf_counter()
        try:
            answers = [workers[name].ask(dict(task.request))]
            while totals is not None and len(answers) < MOST_REPEATS and time.perf_counter() - begin < SHORT_S:
                answers.append(workers[name].ask(dict(task.request)))
        except UnsupportedError as reason:
            outcome.notes.append(f"{task.name}: {reason}")
            return
        except WorkerError as error:
            outcome.failure = f"{task.name}: {error}"
            self.say(f"{name} failed at {outcome.failure}")
            workers.pop(name).close()
            return
        samples = outcome.seconds.setdefault(task.name, [])
        outcome.loss = answers[0].get("loss", outcome.loss)
        if totals is None:
            return
        samples.append(float(median([task.seconds(answer) for answer in answers])))
        total = totals.setdefault((name, task.name), [0.0, 0.0])
        total[0] += sum(worker.cpu_seconds() for worker in others) - before
        total[1] += time.perf_counter() - begin


def compare_logits(found: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, float]:
    """Return how the last logits of several prompts agree with the reference's.

    Returns:
        max_difference, correlation (the least over the prompts), top1_agreement (share of the prompts).
    """
    if any(mine.shape != theirs.shape or not np.isfinite(mine).all() for mine, theirs in zip(found, reference, strict=True)):
        return {"max_difference": float("inf"), "correlation": 0.0, "top1_agreement": 0.0}
    pairs = list(zip(found, reference, strict=True))
    return {
        "max_difference": max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs),
        "correlation": min(float(np.corrcoef(mine, theirs)[0, 1]) for mine, theirs in pairs),
        "top1_agreement": sum(int(mine.argmax()) == int(theirs.argmax()) for mine, theirs in pairs) / len(pairs),
    }


def obstacle(check: Mapping[str, float], bits: int) -> str | None:
    """Return why a variant computes another model than llmq; None when it is the same."""
    if check["correlation"] >= LOWEST_CORRELATION[bits]:
        return None
    return (
        f"its logits are not this model's: correlation {check['correlation']:.3f} with llmq's bf16, at least "
        f"{LOWEST_CORRELATION[bits]} is expected at {bits} bits"
    )
