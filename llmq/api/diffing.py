"""Diffing two runs: every metric of a candidate against a baseline, with a verdict for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import hypot
from pathlib import Path

import torch

from llmq.api.runs import open_run
from llmq.evaluation.estimates import Estimate, batch_means
from llmq.files import atomic_path, check_absent
from llmq.results.diff import Diff, diff_markdown, result_of
from llmq.results.junit import write_junit
from llmq.results.pairing import SPEED, Pair, first_field, machine_of, pair_runs
from llmq.results.record import Environment, Metric, ResultRecord
from llmq.results.run import Run
from llmq.results.tokens import TokenFigures
from llmq.results.tolerances import Tolerances, read_tolerances
from llmq.results.verdict import (
    OUTCOME_OF,
    Change,
    Finding,
    Metered,
    Verdict,
    identical,
    judge_change,
    judge_exact,
    judge_speed,
    noise_floor,
    unjudged,
)

RATIO_TO = "ratio_to "
"""Begins the name of the metric that is a speed over that of another scheme, measured in the same rounds."""
ITSELF = "ratio_of_itself "
"""Begins the name of the metric that is another scheme's speed over its own, measured twice in the same rounds."""


@dataclass(frozen=True, slots=True)
class DiffFiles:
    """Where a diff is written to, besides what is printed."""

    markdown: Path | None = None
    junit: Path | None = None
    force: bool = False


def diff_files(baseline: str, candidate: str, tolerances: Path | None = None, files: DiffFiles | None = None) -> Diff:
    """Compare two runs, each a file of records or a run in history, and write what is asked for.

    Raises:
        InputError: a file is missing or damaged, token figures that a record names included.
        OutputError: a file exists already and `files.force` is not set, or cannot be written.
    """
    files = files or DiffFiles()
    for path in (files.markdown, files.junit):
        if path is not None:
            check_absent(path, force=files.force)
    found = diff_runs(open_run(baseline), open_run(candidate), read_tolerances(tolerances))
    if files.markdown is not None:
        with atomic_path(files.markdown, force=files.force) as temporary:
            temporary.write_text(diff_markdown(found) + "\n", encoding="utf-8")
    if files.junit is not None:
        write_junit(found, files.junit)
    return found


def diff_runs(
    baseline: Run,
    candidate: Run,
    tolerances: Tolerances,
    *,
    further: Sequence[Finding] = (),
    speed_of: Callable[[Pair], Sequence[str]] | None = None,
) -> Diff:
    """Judge every metric that two runs have in common, and say what they have not.

    Args:
        baseline: what is good enough.
        candidate: what is judged.
        tolerances: how much worse it may be.
        further: verdicts that were reached otherwise.
        speed_of: returns the metrics of a pair of speed records that are judged; None: `shared_speeds`.
    """
    pairing = pair_runs(baseline, candidate, tolerances.missing)
    findings: dict[str, list[Finding]] = {}
    for label, pairs in _by_label(pairing.pairs).items():
        found = findings.setdefault(label, [])
        for pair in pairs:
            if pair.kind in SPEED:
                found += _speed(pair, (speed_of or shared_speeds)(pair), tolerances)
            else:
                found += _Quality.of(pair, baseline, candidate, tolerances).findings()
        found += _kernels(label, pairs, tolerances)
        found += _sizes(pairs[-1], tolerances)
    for finding in [*pairing.findings, *further]:
        findings.setdefault(finding.subject, []).append(finding)
    judged = [finding for of_label in findings.values() for finding in of_label]
    return Diff(
        baseline=baseline.name,
        candidate=candidate.name,
        result=result_of(judged),
        findings=judged,
        notes=pairing.notes,
        machines={"baseline": _machines(baseline), "candidate": _machines(candidate)},
        tolerances=tolerances,
    )


def _by_label(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.label, []).append(pair)
    return found


@dataclass
class _Quality:
    """One pair of perplexity or divergence, with the figures of single tokens where both sides have them."""

    pair: Pair
    tolerances: Tolerances
    tokens: tuple[TokenFigures, TokenFigures] | None
    same: bool
    """Every figure of every token is the same."""
    unpaired: str = field(default="")
    """Why figures of single tokens are not used."""

    @classmethod
    def of(cls, pair: Pair, baseline: Run, candidate: Run, tolerances: Tolerances) -> _Quality:
        hashes = [record.tokens_sha256 for record in (pair.baseline, pair.candidate)]
        if hashes[0] is None or hashes[1] is None:
            sides = " and ".join(name for name, sha256 in zip(("baseline", "candidate"), hashes, strict=True) if sha256 is None)
            return cls(pair, tolerances, None, same=False, unpaired=f"the {sides} has no figures of single tokens")
        before, after = baseline.tokens_of(pair.baseline), candidate.tokens_of(pair.candidate)
        assert before is not None and after is not None  # a hash names them  # noqa: PT018
        return cls(pair, tolerances, (before, after), same=hashes[0] == hashes[1])

    def findings(self) -> list[Finding]:
        """The verdicts of this kind of record."""
        limits = self.tolerances.quality
        if self.pair.kind == "perplexity":
            return [self._judged("ln perplexity", "nll", "nats/token", limits.ln_perplexity_increase_nats)]
        before = self.pair.baseline.metrics["kl_mean"].value
        kl_limit = max(limits.kl_increase_nats, limits.kl_increase_percent / 100 * before)
        return [
            self._judged("KL", "kl_mean", "nats/token", kl_limit),
            self._judged("same top-1", "top1_agreement", "%", limits.top1_agreement_loss_percent),
        ]

    def _judged(self, metric: str, name: str, unit: str, tolerance: float) -> Finding:
        """Judge the metric `name` of the records; shares are turned into percent."""
        what = Metered(self.pair.label, self.pair.kind, f"{metric}{self.pair.apart}", unit, worse=-1 if unit == "%" else 1)
        factor = 100.0 if unit == "%" else 1.0
        before, after = (record.metrics[name] for record in (self.pair.baseline, self.pair.candidate))
        if self.same:
            return identical(what, factor * before.value)
        windows = self.pair.baseline.protocol.params.get("n_windows")
        if self.tokens is None:
            change = _unpaired(before, after)
            units, method = windows if isinstance(windows, int) else 1, "unpaired"
        else:
            if not _same_windows(*self.tokens):
                why = "the windows hold different numbers of tokens in the two runs"
                return unjudged(what, Verdict.NOT_COMPARABLE, "incomparable", why)
            change, units, method = _paired(name, *self.tokens), self.tokens[0].window_sizes.size, "paired"
        finding = judge_change(
            what,
            Change(
                factor * before.value,
                factor * after.value,
                factor * change.value,
                None if change.stderr is None else factor * change.stderr,
                units,
                "paired" if method == "paired" else "unpaired",
            ),
            tolerance,
            self.tolerances.quality.confidence,
        )
        return finding.model_copy(update={"reason": f"{finding.reason}; unpaired: {self.unpaired}"}) if self.unpaired else finding


def _paired(name: str, before: TokenFigures, after: TokenFigures) -> Estimate:
    """Estimate the mean of the differences, token by token, from windows as independent units."""
    of_token = {"nll": "nll", "kl_mean": "kl", "top1_agreement": "same_top"}[name]
    ours, theirs = (torch.from_numpy(getattr(tokens, of_token)).double() for tokens in (before, after))
    return batch_means(theirs - ours, torch.from_numpy(before.window_sizes))


def _same_windows(before: TokenFigures, after: TokenFigures) -> bool:
    sizes: list[list[int]] = [tokens.window_sizes.tolist() for tokens in (before, after)]
    return sizes[0] == sizes[1]


def _unpaired(before: Metric, after: Metric) -> Estimate:
    """Estimate the difference of two means as if they were independent, which they are not: its error is too large."""
    stderr = None if before.stderr is None or after.stderr is None else hypot(before.stderr, after.stderr)
    return Estimate(after.value - before.value, stderr)


def shared_speeds(pair: Pair) -> list[str]:
    """Return the ratios to another scheme of the same rounds that both records have, which drift less; else tokens/s."""
    shared = [name for name in pair.baseline.metrics if name.startswith(RATIO_TO) and name in pair.candidate.metrics]
    return shared or ["tokens_per_s"]


def _speed(pair: Pair, names: Sequence[str], tolerances: Tolerances) -> list[Finding]:
    """Judge those metrics of a pair, if both records are of one machine."""
    other = first_field(machine_of(pair.baseline.environment), machine_of(pair.candidate.environment))
    found = []
    for name in names:
        ratio = name.startswith(RATIO_TO)
        said = f"{pair.kind} {ratio_name(name) if ratio else 'tokens/s'}{pair.apart}"
        what = Metered(pair.label, pair.kind, said, "x" if ratio else "tokens/s", worse=-1)
        sides = [record.metrics[name].samples or [] for record in (pair.candidate, pair.baseline) if name in record.metrics]
        if other is not None:
            why = f"speed is not compared between machines: {other}"
            found.append(unjudged(what, Verdict.OTHER_MACHINE, "note", why))
        elif len(sides) < 2 or min(map(len, sides)) < 2:
            why = "a ratio of medians needs at least two repeats on both sides"
            found.append(unjudged(what, Verdict.NOT_COMPARABLE, "incomparable", why))
        else:
            floor = floor_of([pair.baseline, pair.candidate], name, tolerances)
            found.append(judge_speed(what, sides[0], sides[1], tolerances.speed, floor=floor))
    return found


def ratio_name(metric: str) -> str:
    """Return how a metric of `RATIO_TO` is called in tables: 'speed / bf16'."""
    return f"speed / {metric.removeprefix(RATIO_TO)}"


def floor_of(records: Sequence[ResultRecord], name: str, tolerances: Tolerances) -> float | None:
    """Return the noise floor beside the metric `name`: of all these records together, None where none measured one.

    Runs are independent, so their errors add in quadrature.
    """
    floors = [
        noise_floor(samples, tolerances.speed)
        for record in records
        for measured, metric in record.metrics.items()
        if measured.startswith(ITSELF)
        and (not name.startswith(RATIO_TO) or measured.removeprefix(ITSELF) == name.removeprefix(RATIO_TO))
        and len(samples := metric.samples or []) > 1
    ]
    return hypot(*floors) if floors else None


def _kernels(label: str, pairs: Sequence[Pair], tolerances: Tolerances) -> list[Finding]:
    """Judge which kernels ran: on a CPU of the same features they have to be the same."""
    what = Metered(label, None, "kernels", "")
    comparable = [pair for pair in pairs if _features(pair.baseline.environment) == _features(pair.candidate.environment)]
    if not comparable:
        return [unjudged(what, Verdict.OTHER_MACHINE, "note", "kernels are not compared between CPUs of different features")]
    for pair in comparable:
        before, after = pair.baseline.kernels, pair.candidate.kernels
        if before != after:
            reason = f"{pair.kind} ran {_named(after)}, and {_named(before)} in the baseline"
            outcome = OUTCOME_OF[tolerances.speed.different_kernel]
            return [unjudged(what, Verdict.DIFFERENT_KERNEL, outcome, reason)]
    return [unjudged(what, Verdict.IDENTICAL, "pass", _named(comparable[-1].candidate.kernels))]


def _features(environment: Environment) -> tuple[str, list[str]]:
    return environment.device, environment.cpu_features


def _named(kernels: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(kernels.items())) or "none"


def _sizes(pair: Pair, tolerances: Tolerances) -> list[Finding]:
    before, after, limits = pair.baseline.subject, pair.candidate.subject, tolerances.size
    figures = [
        ("size", "bytes", before.size_bytes, after.size_bytes, float(limits.growth_bytes)),
        ("bits/weight", "bits", before.bits_per_weight, after.bits_per_weight, limits.growth_bits_per_weight),
    ]
    return [
        judge_exact(Metered(pair.label, None, name, unit), ours, theirs, tolerance)
        for name, unit, ours, theirs, tolerance in figures
        if ours is not None and theirs is not None
    ]


def _machines(run: Run) -> str:
    """Return the machines of a run in words, each once."""
    return "; ".join(dict.fromkeys(map(_in_words, run.records)))


def _in_words(record: ResultRecord) -> str:
    here = record.environment
    threads = f"{here.threads} thread{'s' if here.threads != 1 else ''}"
    return f"{here.cpu} ({', '.join(here.cpu_features)}), {here.device}, {threads}, torch {here.packages.get('torch', 'unknown')}"
