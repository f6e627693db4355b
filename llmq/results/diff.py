"""Diff: everything that was found between a baseline and a candidate, as data, as a table and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from math import floor, log10
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmq.results import figures
from llmq.results.markdown import to_markdown
from llmq.results.table import Column, Table
from llmq.results.tolerances import Tolerances
from llmq.results.verdict import Finding, Outcome

DIFF_SCHEMA_VERSION = 1

FINE, REGRESSION, NOT_COMPARABLE, COULD_NOT_RUN = 0, 1, 2, 3
"""Exit codes of `llmq report diff` and `llmq ci`."""

Result = Literal["fine", "regression", "not comparable"]

_EXIT_CODES: dict[Result, int] = {"fine": FINE, "regression": REGRESSION, "not comparable": NOT_COMPARABLE}
_MARKS: dict[Result, str] = {"fine": "✅", "regression": "❌", "not comparable": "⚠️"}
_COUNTED: dict[Outcome, str] = {
    "fail": "failed",
    "incomparable": "not comparable",
    "warn": "worse but tolerated",
    "pass": "passed",
    "note": "only noted",
}
_COLUMNS = ("scheme", "metric", "baseline", "candidate", "change", "tolerated", "noise floor", "verdict")
_SMALL = 1e-5
"""Intervals below are written with exponents."""
_LEFT = ("scheme", "metric", "verdict")


class Diff(BaseModel):
    """The verdicts on every metric of a candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = DIFF_SCHEMA_VERSION
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    baseline: str
    candidate: str
    result: Result
    findings: list[Finding]
    notes: list[str]
    machines: dict[str, str]
    """Of 'baseline' and 'candidate', in words."""
    tolerances: Tolerances

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return _EXIT_CODES[self.result]

    def count(self, *outcomes: Outcome) -> int:
        """Return how many verdicts have one of these outcomes."""
        return sum(finding.outcome in outcomes for finding in self.findings)

    def headline(self) -> str:
        """Say in a sentence what came out."""
        counts = ", ".join(f"{count} {words}" for outcome, words in _COUNTED.items() if (count := self.count(outcome)))
        return f"{self.result}: {counts or 'nothing was compared'} ({self.candidate} against {self.baseline})"

    def reasons(self) -> list[str]:
        """Return the reason of every verdict that is more than 'passed', the gravest first."""
        order: tuple[Outcome, ...] = ("fail", "incomparable", "warn", "note")
        return [
            f"{finding.subject}, {finding.metric}: {finding.verdict}: {finding.reason}"
            for outcome in order
            for finding in self.findings
            if finding.outcome == outcome
        ]


def result_of(findings: Sequence[Finding]) -> Result:
    """Return what verdicts come to: a regression is known even where something else cannot be compared."""
    outcomes = {finding.outcome for finding in findings}
    if "fail" in outcomes:
        return "regression"
    return "not comparable" if "incomparable" in outcomes or not outcomes else "fine"


def findings_table(findings: Sequence[Finding]) -> Table:
    """Lay verdicts out, one a row; columns in which nothing stands are left out."""
    cells = [_cells(finding) for finding in findings]
    used = [name for name in _COLUMNS if name in _LEFT or any(row[name] != figures.ABSENT for row in cells)]
    return Table(
        title="",
        header={},
        columns=tuple(Column(name, right=name not in _LEFT) for name in used),
        rows=tuple(tuple(row[name] for name in used) for row in cells),
        notes=(),
    )


def diff_markdown(diff: Diff) -> str:
    """Return a pull-request comment: the result and its reasons, and every verdict folded away below."""
    lines = [f"### {_MARKS[diff.result]} llmq: {diff.headline()}", ""]
    grave = [finding for finding in diff.findings if finding.outcome in ("fail", "incomparable", "warn")]
    if grave:
        lines += [to_markdown(findings_table(grave)), ""]
    lines += [f"- {_inline(reason)}" for reason in diff.reasons()]
    lines += [f"- {_inline(note)}" for note in diff.notes]
    lines += [
        "",
        "<details><summary>All verdicts</summary>",
        "",
        to_markdown(findings_table(diff.findings)),
        "",
        "</details>",
        "",
    ]
    lines += [f"{name}: {_inline(machine)}  " for name, machine in diff.machines.items()]
    lines.append(
        f"Changes of quality with intervals of {diff.tolerances.quality.confidence:.0%}, of speed of "
        f"{diff.tolerances.speed.confidence:.0%}."
    )
    return "\n".join(lines)


def _cells(finding: Finding) -> dict[str, str]:
    return {
        "scheme": finding.subject,
        "metric": finding.metric,
        "baseline": _value(finding.baseline, finding.unit),
        "candidate": _value(finding.candidate, finding.unit),
        "change": _change(finding),
        "tolerated": _change_value(finding.tolerance, finding.change_unit),
        "noise floor": _change_value(finding.noise_floor, finding.change_unit),
        "verdict": finding.verdict.value,
    }


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return figures.ABSENT
    if unit == "bytes":
        return figures.size(value)
    return f"{value:.2f} %" if unit == "%" else figures.plain(value)


def _change_value(value: float | None, unit: str) -> str:
    if value is None:
        return figures.ABSENT
    if unit == "bytes":
        return f"{value:,.0f} B"
    return f"{value:.1f} %" if unit == "%" else figures.plain(value, 2)


def _change(finding: Finding) -> str:
    """Return the change and its interval with as many decimals as the interval's width is worth."""
    if finding.change is None:
        return figures.ABSENT
    unit = " %" if finding.change_unit == "%" else ""
    if finding.low is None or finding.high is None:
        exact = f"{finding.change:+,.0f} B" if finding.change_unit == "bytes" else f"{finding.change:+.4g}{unit}"
        return "0" if finding.change == 0 else exact
    if 0 < max(abs(finding.low), abs(finding.high)) < _SMALL:
        return f"{finding.change:+.1e} [{finding.low:+.1e}, {finding.high:+.1e}]{unit}"
    decimals = _decimals((finding.high - finding.low) / 2)
    return f"{finding.change:+.{decimals}f} [{finding.low:+.{decimals}f}, {finding.high:+.{decimals}f}]{unit}"


def _decimals(half_width: float) -> int:
    """Return how many decimals show two digits of an interval's half width."""
    return min(9, max(0, 1 - floor(log10(half_width)))) if half_width > 0 else 4


def _inline(text: str) -> str:
    """Let nothing in a sentence be taken for mark-up."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
