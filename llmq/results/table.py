"""The comparison table: one row a scheme, made of records that may be compared, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.errors import UsageError
from llmq.results import figures
from llmq.results.record import Cache, Kind, Metric, ResultRecord, Subject

KINDS: tuple[Kind, ...] = ("perplexity", "divergence", "prefill", "decode")
"""Kinds of records that the table is made of; others are passed over."""

_SPEED: tuple[Kind, ...] = ("prefill", "decode")
_SHOWN_OPTIONS = ("group_size",)
"""Options that a row's label always shows, because schemes are never compared without them."""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and on which side its cells are aligned."""

    heading: str
    right: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell says, and the number behind it."""

    text: str
    value: float | None = None
    """In the unit of the heading; None where there is no number."""
    stderr: float | None = None
    factor: float = 1.0
    """Of the unit that the text is in, such as 100 for percent."""


@dataclass(frozen=True)
class Table:
    """Plain cells, ready to be drawn: by rich on a terminal, or by `llmq.results.markdown`."""

    title: str
    header: Mapping[str, str]
    """What holds for every row, by name: model, text, protocol, machine …"""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...] = ()
    """The rows with the numbers behind them, where the table is of records."""


@dataclass(frozen=True)
class Row:
    """The newest record of each kind of one subject."""

    label: str
    subject: Subject
    records: Mapping[Kind, ResultRecord]

    def metric(self, kind: Kind, name: str) -> Metric | None:
        """Return a metric of the record of this kind, if there are both."""
        return self.records[kind].metrics.get(name) if kind in self.records else None


def comparison_table(records: Sequence[ResultRecord]) -> Table:
    """Join records on their subject and lay them out, in the order in which schemes first appear.

    ± is one standard error throughout. Of several records of one kind and subject the newest counts, and a note says so.

    Raises:
        UsageError: no record belongs into such a table, or they must not share one: they differ in checkpoint, in the protocol
            or text of one kind, or in the machine. The message names the first field that differs, and its two values.
    """
    usable = [record for record in records if record.kind in KINDS]
    if not usable:
        raise UsageError(f"there is no record of kind {', '.join(KINDS)} to make a table of, among {len(records)} records.")
    check_comparable(usable)
    rows, superseded = joined(usable)
    by_word = any(row.metric("perplexity", "word_perplexity") for row in rows)
    cells = [_cells(row, by_word=by_word) | ({} if _one_cache(rows) else _cache_cells(row)) for row in rows]
    headings = [heading for heading in cells[0] if any(row[heading].text != figures.ABSENT for row in cells)]
    notes = [f"{superseded} older record{'s' if superseded > 1 else ''} of the same measurement left out."] if superseded else []
    notes += _record_notes(rows)
    return Table(
        title=_title(rows),
        header=_header(rows),
        columns=tuple(Column(heading, right=heading != "scheme") for heading in headings),
        rows=tuple(tuple(row[heading].text for heading in headings) for row in cells),
        notes=tuple(notes),
        cells=tuple(tuple(row[heading] for heading in headings) for row in cells),
    )


def _title(rows: Sequence[Row]) -> str:
    """Return the model, how many schemes there are, and how many KV caches where there are several."""
    schemes = len({subject_key(row.subject.model_copy(update={"kv_cache": None})) for row in rows})
    caches = len({_kv_name(row.subject) for row in rows})
    title = f"{rows[0].subject.model}: {schemes} scheme{'s' if schemes != 1 else ''}"
    return title if caches == 1 else f"{title}, {caches} KV caches"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first field in which two records differ that would have to agree for them to be compared."""

    field: str
    values: tuple[Any, Any]
    schemes: tuple[str, str]
    kind: str = ""
    """Of the records; empty for a field that records of all kinds have to agree in."""


def check_comparable(records: Sequence[ResultRecord]) -> None:
    """Raise UsageError when records must not stand in one table; see `comparison_table`."""
    found = first_difference(records)
    if found is not None:
        raise UsageError(
            f"{found.kind}{' ' if found.kind else ''}records of {found.field} {found.values[0]!r} ({found.schemes[0]}) and "
            f"{found.values[1]!r} ({found.schemes[1]}) cannot share a table; choose records that agree in {found.field}."
        )


def first_difference(records: Sequence[ResultRecord]) -> Difference | None:
    """Return why records must not stand in one table, None where they may."""
    tokenized = [record for record in records if record.subject.tokenizer_sha256 is not None]
    found = (
        _unequal(records, "", lambda record: {name: getattr(record.subject, name) for name in ("model", "checkpoint_sha256")})
        or _unequal(tokenized, "", lambda record: {"tokenizer_sha256": record.subject.tokenizer_sha256})
        or _unequal(records, "", _machine)
    )
    for kind in dict.fromkeys(record.kind for record in records) if found is None else ():
        alike = [record for record in records if record.kind == kind]
        found = found or _unequal(alike, kind, _protocol)
    return found


def _unequal(
    records: Sequence[ResultRecord], kind: str, fields_of: Callable[[ResultRecord], Mapping[str, Any]]
) -> Difference | None:
    for record in records[1:]:
        first, other = dict(_flat(fields_of(records[0]))), dict(_flat(fields_of(record)))
        for name in [*first, *(name for name in other if name not in first)]:
            if first.get(name) != other.get(name):
                schemes = (records[0].subject.scheme, record.subject.scheme)
                return Difference(name, (first.get(name), other.get(name)), schemes, kind)
    return None


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, "" if key == "params" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _protocol(record: ResultRecord) -> dict[str, Any]:
    return record.protocol.model_dump() | {"threads": record.environment.threads}


def _machine(record: ResultRecord) -> dict[str, Any]:
    here = record.environment
    return {"cpu": here.cpu, "device": here.device, "torch": here.packages.get("torch")}


def joined(records: Sequence[ResultRecord]) -> tuple[list[Row], int]:
    """Return a row for each subject in order of appearance, and how many records gave way to newer ones.

    Args:
        records: that may be compared; see `check_comparable`.
    """
    newest: dict[str, dict[Kind, ResultRecord]] = {}
    superseded = 0
    for record in records:
        of_subject = newest.setdefault(subject_key(record.subject), {})
        before = of_subject.get(record.kind)
        superseded += before is not None
        if before is None or record.created_at >= before.created_at:
            of_subject[record.kind] = record
    subjects = [max(found.values(), key=lambda record: record.created_at).subject for found in newest.values()]
    return [
        Row(subject_label(own, subjects), own, found) for own, found in zip(subjects, newest.values(), strict=True)
    ], superseded


def subject_key(subject: Subject) -> str:
    """Return what makes two measurements of one model a pair: scheme, options and the dtype of the KV cache."""
    return json.dumps([subject.scheme, subject.options, subject.kv_cache and subject.kv_cache.dtype], sort_keys=True)


def subject_label(subject: Subject, all_subjects: Sequence[Subject]) -> str:
    """Return the scheme, those of its options that tell it from other rows, and the KV cache where there is more than one."""
    namesakes = [other.options for other in all_subjects if other.scheme == subject.scheme]
    shown = [
        f"{name}={'none' if value is None else value}"
        for name, value in subject.options.items()
        if (name in _SHOWN_OPTIONS and value is not None) or any(options.get(name) != value for options in namesakes)
    ]
    if any(_kv_name(other) != _kv_name(subject) for other in all_subjects):
        shown.append(f"kv={_kv_name(subject)}")
    return " ".join([subject.scheme, *shown])


def _kv_name(subject: Subject) -> str:
    """Return the dtype of the subject's KV cache; records of schema version 1 do not say it."""
    return "unknown" if subject.kv_cache is None else subject.kv_cache.dtype


def _one_cache(rows: Sequence[Row]) -> Cache | None:
    """Return the KV cache of all rows, None where they have several or do not say which."""
    first = rows[0].subject.kv_cache
    return first if all(row.subject.kv_cache == first for row in rows) else None


def cache_in_words(cache: Cache) -> str:
    """Return a KV cache's dtype and what it takes."""
    return (
        f"{cache.dtype}, {figures.size(cache.bytes_per_token)} a token, {figures.size(cache.bytes_at_context)} a sequence at "
        f"the context's limit of {cache.context_tokens:,} tokens"
    )


def _cache_cells(row: Row) -> dict[str, Cell]:
    """Return what the KV cache of one sequence takes: a token, and the model's whole context."""
    cache = row.subject.kv_cache
    return {
        "KV/token": _size(None if cache is None else cache.bytes_per_token),
        "KV at limit": _size(None if cache is None else cache.bytes_at_context),
    }


def _cells(row: Row, *, by_word: bool) -> dict[str, Cell]:
    """Return the row's cells by heading; the headings are the same for every row."""
    share = row.metric("decode", "bandwidth_share")
    bandwidth = row.metric("decode", "bandwidth_gbps")
    achieved = Cell(figures.ABSENT)
    if bandwidth is not None:
        of_machine = "" if share is None else f" ({share.value:.0%})"
        achieved = Cell(figures.plain(bandwidth.value, 3) + of_machine, bandwidth.value)
    bits = row.subject.bits_per_weight
    return {
        "scheme": Cell(row.label),
        **_perplexity(row, by_word=by_word),
        "Δ ln ppl": _figure(row.metric("divergence", "delta_ln_perplexity")),
        "KL (nats/token)": _figure(row.metric("divergence", "kl_mean")),
        "same top-1": _figure(row.metric("divergence", "top1_agreement"), percent=True),
        "prefill tok/s": _figure(row.metric("prefill", "tokens_per_s")),
        "decode tok/s": _figure(row.metric("decode", "tokens_per_s")),
        "GB/s": achieved,
        "bits/weight": Cell(figures.ABSENT if bits is None else f"{bits:.2f}", bits),
        "size": _size(row.subject.size_bytes),
    }


def _perplexity(row: Row, *, by_word: bool) -> dict[str, Cell]:
    """Return the perplexity that the protocol is known for: per word where it is defined, else per token."""
    if by_word:
        return {"word perplexity": _figure(row.metric("perplexity", "word_perplexity"))}
    return {"perplexity": _figure(row.metric("perplexity", "perplexity"))}


def _figure(metric: Metric | None, *, percent: bool = False) -> Cell:
    if metric is None:
        return Cell(figures.ABSENT)
    factor, unit = (100.0, " %") if percent else (1.0, "")
    text = figures.with_error(metric.value, metric.stderr, factor=factor, unit=unit)
    return Cell(text, metric.value, metric.stderr, factor)


def _size(nbytes: int | None) -> Cell:
    return Cell(figures.ABSENT) if nbytes is None else Cell(figures.size(nbytes), float(nbytes))


def _header(rows: Sequence[Row]) -> dict[str, str]:
    """Return what holds for all rows, in words; only what was measured is mentioned."""
    records = [record for row in rows for record in row.records.values()]
    first = records[0]
    header = {"model": f"{first.subject.model} (sha256 {first.subject.checkpoint_sha256[:12]})"}
    quality = next((record for record in records if record.kind in ("perplexity", "divergence")), None)
    if quality is not None:
        header |= _text_and_protocol(quality)
    for kind in _SPEED:
        speed = next((record for record in records if record.kind == kind), None)
        if speed is not None:
            header[kind] = _parameters(speed.protocol.params)
    if cache := _one_cache(rows):
        header["KV cache"] = cache_in_words(cache)
    here = first.environment
    threads = {record.kind: record.environment.threads for record in records}
    used = sorted(set(threads.values()))
    by_kind = ", ".join(f"{kind} {count}" for kind, count in threads.items())
    header["machine"] = (
        f"{here.cpu}, {here.device}, {used[0] if len(used) == 1 else by_kind} thread{'s' if used != [1] else ''}, "
        f"torch {here.packages.get('torch', 'unknown')}"
    )
    kernels = [f"{row.label}: {names}" for row in rows if (names := _kernels(row))]
    if kernels:
        header["kernels"] = "; ".join(kernels)
    header["±"] = "one standard error"
    return header


def _text_and_protocol(record: ResultRecord) -> dict[str, str]:
    params = dict(record.protocol.params)
    text, sha256 = params.pop("text", None), params.pop("text_sha256", None)
    found = {}
    if text is not None or sha256 is not None:
        found["text"] = f"{text or 'unnamed'}" + (f" (sha256 {sha256[:12]})" if sha256 else "")
    found["protocol"] = f"{record.protocol.name} v{record.protocol.version}: {_parameters(params)}"
    return found


def _parameters(params: Mapping[str, Any]) -> str:
    """Return parameters in words, without those that were left open."""
    return "; ".join(
        f"{name.removeprefix('n_').replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else value}"
        for name, value in params.items()
        if value is not None and not isinstance(value, bool | Mapping | list)
    )


def _kernels(row: Row) -> str:
    """Return the kernels that ran, decode's where it was measured."""
    order: tuple[Kind, ...] = ("decode", "prefill", "perplexity", "divergence")
    for kind in order:
        if kind in row.records and row.records[kind].kernels:
            return ", ".join(f"{name} ({count})" for name, count in sorted(row.records[kind].kernels.items()))
    return ""


def _record_notes(rows: Sequence[Row]) -> list[str]:
    """Return the records' own notes, each once, with the rows they hold for unless they hold for all."""
    holders: dict[str, list[str]] = {}
    for row in rows:
        for note in dict.fromkeys(note for record in row.records.values() for note in record.notes):
            holders.setdefault(note, []).append(row.label)
    return [note if len(labels) == len(rows) else f"{', '.join(labels)}: {note}" for note, labels in holders.items()]
