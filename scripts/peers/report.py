"""Records of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.benchmark.order_statistics import paired_ratios, summarize
from llmq.benchmark.speed import rate_metric, time_metric
from llmq.results.record import Environment, Metric, Protocol, ResultRecord, Subject
from peers.catalogue import VARIANTS
from peers.rounds import Outcome, Task

PROTOCOL_VERSION = 1
IDLE_LIMIT = 0.02
"""Share of a core that waiting engines may use before a note says so."""


@dataclass(frozen=True, slots=True)
class Reporter:
    """What all records of one run have in common."""

    model: str
    sha256: str
    environment: Environment
    tasks: Sequence[Task]
    bandwidth_gbps: float

    def records(self, outcomes: Mapping[str, Outcome]) -> list[ResultRecord]:
        """Return one record for each variant and task, and one without a metric for each variant that did not run."""
        found = []
        for outcome in outcomes.values():
            measured = [task for task in self.tasks if outcome.seconds.get(task.name)]
            found += [self.record(outcome, task, outcomes) for task in measured]
            if outcome.failure is not None or not measured:
                found.append(self.refusal(outcome))
        return found

    def record(self, outcome: Outcome, task: Task, outcomes: Mapping[str, Outcome]) -> ResultRecord:
        """Return the record of one variant and task."""
        seconds = outcome.seconds[task.name]
        metrics = {"tokens_per_s": rate_metric(seconds, task.tokens, "tokens/s"), "seconds": time_metric(seconds)}
        if task.name.startswith("decode"):
            step = float(outcome.info["step_bytes"])
            floor = step / 1e9 / self.bandwidth_gbps
            metrics |= {
                "bytes_per_step": Metric(value=step, unit="bytes"),
                "bandwidth_gbps": rate_metric(seconds, step / 1e9, "GB/s", keep_samples=False),
                "bandwidth_share": rate_metric(seconds, floor, "1", keep_samples=False),
                "floor_s": Metric(value=floor, unit="s"),
                "machine_bandwidth_gbps": Metric(value=self.bandwidth_gbps, unit="GB/s"),
            }
        if task.name.startswith("score") and outcome.loss is not None:
            metrics["loss"] = Metric(value=outcome.loss, unit="nats/token")
        metrics |= {f"check_{name}": Metric(value=value, unit="1") for name, value in outcome.check.items()}
        metrics["idle_cpu_share"] = Metric(value=outcome.idle.get(task.name, 0.0), unit="1")
        metrics |= self.ratios(outcome, task, outcomes)
        return ResultRecord(
            kind="decode" if task.name.split("-")[0] in ("decode", "batch") else "prefill",
            subject=self.subject(outcome),
            protocol=self.protocol(task),
            metrics=metrics,
            environment=self.environment,
            notes=self.notes(outcome, task),
        )

    def ratios(self, outcome: Outcome, task: Task, outcomes: Mapping[str, Outcome]) -> dict[str, Metric]:
        """Return how much faster each of llmq's variants of these bits was than this peer, round by round."""
        if VARIANTS[outcome.name].is_llmq:
            return {}
        found = {}
        for name, other in outcomes.items():
            same = VARIANTS[name].is_llmq and VARIANTS[name].bits == VARIANTS[outcome.name].bits
            mine = other.seconds.get(task.name, []) if same else []
            shared = min(len(mine), len(outcome.seconds[task.name]))
            if shared:
                samples = paired_ratios(outcome.seconds[task.name][:shared], mine[:shared])
                summary = summarize(samples)
                found[f"speedup_of_{name}"] = Metric(value=summary.median, unit="1", stderr=summary.stderr, samples=samples)
        return found

    def refusal(self, outcome: Outcome) -> ResultRecord:
        """Return the record of a variant that did not run, or not to the end: its reason."""
        protocol = Protocol(name="peers-refusal", version=PROTOCOL_VERSION, params={})
        return ResultRecord(
            kind="decode",
            subject=self.subject(outcome),
            protocol=protocol,
            metrics={},
            environment=self.environment,
            notes=[f"not measured: {outcome.failure or 'it was asked for nothing that it can do'}"],
        )

    def subject(self, outcome: Outcome) -> Subject:
        """Return what a record says of a variant; llmq's own say what its other records say too."""
        variant, info = VARIANTS[outcome.name], outcome.info
        options: dict[str, Any] = {"bits": variant.bits, "engine": variant.environment.replace("_", ".")}
        options |= {name: info[name] for name in ("version", "head", "settings", "build") if name in info}
        options |= {"about": variant.about} if variant.about else {}
        own = info.get("subject", {})
        if own:
            options["scheme_options"] = own["options"]
        return Subject(
            model=self.model,
            checkpoint_sha256=self.sha256,
            scheme=outcome.name,
            options=options,
            bits_per_weight=own.get("bits_per_weight"),
            file_bits_per_weight=own.get("file_bits_per_weight"),
            size_bytes=info.get("bytes"),
        )

    def protocol(self, task: Task) -> Protocol:
        """Return how a task was measured."""
        request = {name: value for name, value in task.request.items() if name not in ("op", "tokens")}
        params = {"task": task.name, "tokens": len(task.request["tokens"]), **request}
        return Protocol(name=f"peers-{task.request['op']}", version=PROTOCOL_VERSION, params=params)

    def notes(self, outcome: Outcome, task: Task) -> list[str]:
        """Return what a reader must know of one measurement."""
        variant = VARIANTS[outcome.name]
        found = [f"in turns with all other engines at {variant.bits} bits, all of them loaded"]
        idle = outcome.idle.get(task.name, 0.0)
        if idle > IDLE_LIMIT:
            found.append(f"engines that waited used {idle:.0%} of a core meanwhile")
        return found + outcome.notes
