"""Pairing: which record of a candidate is measured against which of a baseline, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq.results.record import Environment, Kind, ResultRecord, Subject
from llmq.results.run import Run
from llmq.results.table import KINDS, subject_key, subject_label
from llmq.results.tolerances import Reaction
from llmq.results.verdict import OUTCOME_OF, Finding, Metered, Verdict, unjudged

SPEED: tuple[Kind, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Pair:
    """Two records of one subject, kind and protocol; quality of one tokenizer too."""

    label: str
    baseline: ResultRecord
    candidate: ResultRecord
    apart: str = ""
    """What keeps it apart from other pairs of this subject and kind, such as ' (batch_size=4)'."""

    @property
    def kind(self) -> Kind:
        """Of both."""
        return self.baseline.kind


@dataclass
class Pairing:
    """What two runs have in common, and verdicts on what they have not."""

    pairs: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Side:
    """The newest record of each protocol, by subject and kind, of one run."""

    found: dict[tuple[str, str, Kind], dict[str, ResultRecord]] = field(default_factory=dict)
    superseded: int = 0

    def take(self, record: ResultRecord) -> None:
        key = (record.subject.model, subject_key(record.subject), record.kind)
        of_kind = self.found.setdefault(key, {})
        protocol = json.dumps(_protocol(record), sort_keys=True)
        before = of_kind.get(protocol)
        self.superseded += before is not None
        if before is None or record.created_at >= before.created_at:
            of_kind[protocol] = record


def pair_runs(baseline: Run, candidate: Run, missing: Reaction) -> Pairing:
    """Join two runs on model, scheme, options, KV cache, kind and protocol, in the order of the baseline.

    The hash of the checkpoint is no part of it, because it may be what has changed. What has a partner of another protocol, text
    or tokenizer is not comparable; what has none is missing, or new. Of several records of one measurement the newest counts.
    """
    sides = []
    for run in (baseline, candidate):
        side = _Side()
        for record in run.records:
            if record.kind in KINDS:
                side.take(record)
        sides.append(side)
    before, after = sides
    pairing = Pairing()
    subjects = [record.subject for run in (baseline, candidate) for record in run.records if record.kind in KINDS]
    distinct = list({(subject.model, subject_key(subject)): subject for subject in subjects}.values())
    for key in dict.fromkeys([*before.found, *after.found]):
        ours, theirs = dict(before.found.get(key, {})), dict(after.found.get(key, {}))
        example = next(iter([*ours.values(), *theirs.values()]))
        label = labelled(example.subject, distinct)
        params = [record.protocol.params for record in [*ours.values(), *theirs.values()]]
        for protocol in [protocol for protocol in ours if protocol in theirs]:
            left, right = ours.pop(protocol), theirs.pop(protocol)
            _join(pairing, Pair(label, left, right, _apart(left.protocol.params, params)))
        for mine, other in zip(list(ours), list(theirs), strict=False):
            _join(pairing, Pair(label, ours.pop(mine), theirs.pop(other)))
        for record in ours.values():
            pairing.findings.append(_missing(Metered(label, record.kind, record.kind, ""), record, candidate, missing))
        for record in theirs.values():
            what = Metered(label, record.kind, record.kind, "")
            pairing.findings.append(unjudged(what, Verdict.NEW, "note", "the baseline has no such measurement"))
    for name, side in (("baseline", before), ("candidate", after)):
        if side.superseded:
            pairing.notes.append(f"{side.superseded} older records of the same measurement in the {name} were left out")
    return pairing


def labelled(subject: Subject, subjects: Sequence[Subject]) -> str:
    """Return a subject's label among all of them, with the model's name where there are several models."""
    label = subject_label(subject, subjects)
    return label if len({other.model for other in subjects}) == 1 else f"{subject.model} {label}"


def machine_of(environment: Environment) -> dict[str, Any]:
    """Return what has to be equal for two speeds to be comparable."""
    return {name: getattr(environment, name) for name in ("cpu", "cpu_features", "device", "threads", "cores")}


def first_field(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Return 'NAME is A in the baseline and B in the candidate' for the first field that differs, None where none does."""
    left, right = dict(_flat(ours)), dict(_flat(theirs))
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            return f"{name} is {left.get(name)!r} in the baseline and {right.get(name)!r} in the candidate"
    return None


def _join(pairing: Pairing, pair: Pair) -> None:
    """Take in a pair, or the verdict on why it is none."""
    before, after = pair.baseline, pair.candidate
    what = Metered(pair.label, pair.kind, pair.kind, "")
    tokenizers = [{} if pair.kind in SPEED else _tokenizer(record.subject) for record in (before, after)]
    # a tokenizer first: with another one the numbers of windows and tokens differ too
    reason = first_field(*tokenizers) or first_field(_protocol(before), _protocol(after))
    if reason is not None:
        pairing.findings.append(unjudged(what, Verdict.NOT_COMPARABLE, "incomparable", reason))
        return
    pairing.pairs.append(pair)
    changed = first_field(*({"checkpoint_sha256": record.subject.checkpoint_sha256} for record in (before, after)))
    note = f"{pair.label}: {changed}"
    if changed and note not in pairing.notes:
        pairing.notes.append(note)


def _apart(own: Mapping[str, Any], of_all: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name, value in own.items() if name != "text" and any(params.get(name) != value for params in of_all)]
    return f" ({', '.join(f'{name}={own[name]}' for name in names)})" if names else ""


def _missing(what: Metered, record: ResultRecord, candidate: Run, missing: Reaction) -> Finding:
    """Say that the candidate has no such record, or that it cannot have it because its tokenizer is another one."""
    own = (record.subject.model, subject_key(record.subject))
    subjects = [other.subject for other in candidate.records if (other.subject.model, subject_key(other.subject)) == own]
    tokenized = next((subject for subject in subjects if subject.tokenizer_sha256 is not None), None)
    changed = first_field(_tokenizer(record.subject), _tokenizer(tokenized)) if tokenized is not None else None
    if changed and what.kind not in SPEED:
        return unjudged(what, Verdict.NOT_COMPARABLE, "incomparable", changed)
    models = sorted({other.subject.model for other in candidate.records})
    reason = "the candidate has no such measurement"
    if record.subject.model not in models:
        reason = f"the candidate has no model {record.subject.model!r}; it has {', '.join(map(repr, models)) or 'none'}"
    return unjudged(what, Verdict.MISSING, OUTCOME_OF[missing], reason)


def _tokenizer(subject: Subject) -> dict[str, Any]:
    return {"tokenizer_sha256": subject.tokenizer_sha256}


def _protocol(record: ResultRecord) -> dict[str, Any]:
    """Return what two protocols are compared by: all of it, but a text by its hash and not by its name."""
    fields = record.protocol.model_dump(mode="json")
    if fields["params"].get("text_sha256") is not None:
        fields["params"].pop("text", None)
    return fields


def _flat(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value
