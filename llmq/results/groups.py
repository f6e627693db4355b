"""Groups: records of several runs, sorted into those that may be compared with one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmq.results.record import Kind, ResultRecord
from llmq.results.run import Run
from llmq.results.table import KINDS, Difference, first_difference

COMPARED: tuple[Kind, ...] = (*KINDS, "layers")
"""Kinds of records that are of a model; the others stand for themselves."""


@dataclass
class Group:
    """Records that may be compared, of one run or several."""

    records: list[ResultRecord] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    """Names of the runs that they are of, each once."""
    apart: Difference | None = None
    """What keeps the group apart from the first one; None for that one."""

    def add(self, run: Run, records: Sequence[ResultRecord]) -> None:
        """Take in records of a run that may be compared with those that are here."""
        known = {record.id for record in self.records}
        self.records += [record for record in records if record.id not in known]
        if run.name not in self.runs:
            self.runs.append(run.name)

    def difference(self, records: Sequence[ResultRecord]) -> Difference | None:
        """Return why records must not be compared with those that are here."""
        return first_difference([*self._examples(), *records])

    def _examples(self) -> list[ResultRecord]:
        """Return records that stand for all, because all agree: the first, the first of each kind, the first with a tokenizer."""
        chosen: dict[str, ResultRecord] = {}
        for record in self.records:
            chosen.setdefault(record.kind, record)
            if record.subject.tokenizer_sha256 is not None:
                chosen.setdefault("tokenizer", record)
        return list(chosen.values())


def comparable_groups(runs: Sequence[Run]) -> list[Group]:
    """Sort the records of runs into groups, in the order in which they first appear; records of other kinds are passed over.

    A run whose records agree stays whole: it joins the first group that all of it may be compared with. A run whose records do
    not agree is taken apart, each record into the first group of that run that it may be compared with. A record counts once
    in a group, however many runs have it.
    """
    groups: list[Group] = []
    for run in runs:
        parts = _parts(run)
        for part in parts:
            home = next((group for group in groups if len(parts) == 1 and group.difference(part) is None), None)
            if home is None:
                home = Group(apart=groups[0].difference(part) if groups else None)
                groups.append(home)
            home.add(run, part)
    return groups


def _parts(run: Run) -> list[list[ResultRecord]]:
    """Cut the records of a run into parts that agree in themselves; the whole run where it does."""
    own = [record for record in run.records if record.kind in COMPARED]
    if first_difference(own) is None:
        return [own] if own else []
    found: list[Group] = []
    for record in own:
        home = next((group for group in found if group.difference([record]) is None), None)
        if home is None:
            home = Group()
            found.append(home)
        home.add(run, [record])
    return [group.records for group in found]
