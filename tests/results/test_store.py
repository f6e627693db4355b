"""The record file: round trip, many writers at once, and every way a line can be damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from llmq.errors import InputError, OutputError
from llmq.results import store
from llmq.results.record import Environment, Metric, Protocol, ResultRecord, Subject
from llmq.results.store import append_records, parse_line, read_many, read_records, read_tokens, to_json_line
from llmq.results.tokens import TokenFigures, parse_tokens


def record(scheme: str = "int4", value: float = 5.5, notes: list[str] | None = None) -> ResultRecord:
    return ResultRecord(
        kind="perplexity",
        subject=Subject(model="tiny", checkpoint_sha256="ab", scheme=scheme, options={"group_size": 32}, bits_per_weight=4.5),
        protocol=Protocol(name="windows", version=1, params={"window": 256, "text_sha256": "cd"}),
        metrics={"perplexity": Metric(value=value, unit="1", stderr=0.125, samples=[value])},
        environment=Environment(
            llmq="0.1.0",
            python="3.11.7",
            packages={"torch": "2.13.0"},
            platform="Linux",
            cpu="CPU — ünïcode",
            cpu_features=["avx2"],
            cores=2,
            threads=2,
            device="cpu",
            memory_bytes=1,
        ),
        notes=notes or [],
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "records.jsonl"
    written = [record(), record("bf16", 5.0), record(notes=["line\nbreak \u2028"])]
    append_records(path, written[:2])
    append_records(path, written[2:])
    append_records(path, [])
    assert read_records(path) == written
    assert path.read_bytes().count(b"\n") == 3
    assert read_many([path, path]) == written * 2


def _writer(path: Path, name: str, barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait()
    for index in range(25):
        append_records(path, [record(name, float(index), ["x" * 20_000]), record(name, float(index) + 0.5)])


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_writer, args=(path, name, barrier)) for name in ("int4", "bf16")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    records = read_records(path)
    assert len(records) == 100
    expected = [value + part for value in range(25) for part in (0.0, 0.5)]
    for name in ("int4", "bf16"):
        assert [item.metrics["perplexity"].value for item in records if item.subject.scheme == name] == expected
    pairs = [(a.subject.scheme, b.subject.scheme) for a, b in zip(records[::2], records[1::2], strict=True)]
    assert all(first == second for first, second in pairs), "one append was torn apart by another"


def test_a_cut_off_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [record()])
    with path.open("ab") as file:
        file.write(b'{"schema_version": 1, "kind"')
    append_records(path, [record("bf16")])
    with pytest.raises(InputError, match=r"records\.jsonl line 2 is not JSON \(.* at column \d+\)"):
        read_records(path)
    lines = path.read_text().splitlines()
    assert parse_line(lines[2], "here").subject.scheme == "bf16"


def test_a_short_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [record()])
    before = path.read_bytes()
    real = os.write
    monkeypatch.setattr(store.os, "write", lambda descriptor, data: real(descriptor, data[:40]))
    with pytest.raises(OutputError, match=r"cannot append to .*records\.jsonl: .*only a part"):
        append_records(path, [record("bf16")])
    assert path.read_bytes() == before


def test_a_failing_write_is_reported_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "write", full)
    with pytest.raises(OutputError, match="No space left on device; check the free space"):
        append_records(path, [record()])
    assert path.read_bytes() == b""


def test_a_folder_cannot_be_appended_to(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot open .* Is a directory"):
        append_records(tmp_path, [record()])


def changed(**fields: object) -> str:
    data = json.loads(to_json_line(record()))
    data.update(fields)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"line 2 is not JSON"),
        ("[1, 2]", r"line 2 is no result record: it has no schema_version"),
        ('{"a": 1}', r"line 2 is no result record: it has no schema_version"),
        (changed(schema_version=99), r"line 2 has schema_version 99, and this llmq reads 1, 2, 3"),
        (changed(schema_version="1"), r"line 2 has schema_version '1', and this llmq reads 1, 2, 3"),
        (changed(kind="vibes"), r"line 2 is no valid record: kind: "),
        (changed(metrics={"a": {"value": "many", "unit": "1"}}), r"line 2 is no valid record: metrics\.a\.value: "),
        (changed(extra=1, more=2), r"line 2 is no valid record: extra: .* \(and 1 more\)"),
    ],
    ids=["text", "list", "object", "newer schema", "schema as text", "kind", "metric", "extra fields"],
)
def test_damaged_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f"{to_json_line(record())}\n{line}\n")
    with pytest.raises(InputError, match=r"records\.jsonl " + message):
        read_records(path)


def test_records_of_an_older_schema_are_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    data = json.loads(to_json_line(record()))
    assert data["schema_version"] == 3
    del data["subject"]["kv_cache"], data["details"], data["tokens_sha256"]
    path.write_text(json.dumps(data | {"schema_version": 1}) + "\n")
    (old,) = read_records(path)
    assert (old.schema_version, old.subject.kv_cache) == (1, None)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"binary\.jsonl: it is not UTF-8 \(byte 0\)"):
        read_records(tmp_path / "binary.jsonl")


def test_empty_lines_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n\n")
    assert read_records(path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_not_stored(tmp_path: Path, value: float) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(OutputError, match=f"a perplexity record of int4 cannot be stored: metric perplexity is {value}"):
        append_records(path, [record(), record(value=value)])
    assert not path.exists()


def figures(shift: float = 0.0) -> TokenFigures:
    nll = np.arange(5, dtype=np.float32) + np.float32(shift)
    return TokenFigures(nll, np.array([3, 2], np.int32), nll / 8, np.array([True, False, True, True, False]))


def test_token_figures_lie_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    written = [
        record().with_tokens(figures()),
        record("bf16").with_tokens(figures()),
        record("fp32").with_tokens(figures(0.5)),
        record(),
    ]
    append_records(path, written)
    append_records(path, written[:1])
    read = read_records(path)
    assert [each.tokens_sha256 for each in read[:4]] == [each.tokens_sha256 for each in written]
    assert len(list((tmp_path / "runs.tokens").iterdir())) == 2  # the same figures once
    assert read_tokens(path, read[3]) is None
    for given, found in zip(written[:3], read, strict=False):
        tokens = read_tokens(path, found)
        for name in ("nll", "window_sizes", "kl", "same_top"):
            np.testing.assert_array_equal(getattr(tokens, name), getattr(given.tokens, name), strict=True)
    assert len({figures().sha256 for _ in range(20)}) == 1
    assert figures().sha256 != figures(0.5).sha256


def test_token_figures_that_changed_or_went_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_records(path, [record().with_tokens(figures())])
    (read,) = read_records(path)
    (beside,) = (tmp_path / "runs.tokens").iterdir()
    whole = beside.read_bytes()
    beside.write_bytes(whole[:-1] + b"x")
    with pytest.raises(InputError, match="it was changed; restore it"):
        read_tokens(path, read)
    torn = TokenFigures(np.zeros(4, np.float32), np.array([3, 2], np.int32))
    with pytest.raises(InputError, match=r"damaged: \[4\] tokens in windows of 5"):
        parse_tokens(torn.data, torn.sha256, "here")
    beside.unlink()
    with pytest.raises(InputError, match="copy the folder along with the file"):
        read_tokens(path, read)


def test_figures_under_a_foreign_hash_are_refused() -> None:
    with pytest.raises(ValidationError, match="make such records with `with_tokens`"):
        ResultRecord(**{**dict(record()), "tokens": figures(), "tokens_sha256": "ab"})
