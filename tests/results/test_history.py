"""History: what is kept, by whom and under which names; several writers, kills, and files that are no history."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from made import START, made, tokens

import llmq
from llmq.errors import InputError, OutputError, UsageError
from llmq.results import database
from llmq.results.history import History, history_path, open_history
from llmq.results.store import to_json_line

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "history.db"


def check_whole(path: Path, size: int) -> list[str]:
    """The database is sound, and each of its runs has `size` records with their token figures; returns the runs' notes."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        (orphans,) = connection.execute(
            "SELECT count(*) FROM tokens WHERE sha256 NOT IN (SELECT tokens_sha256 FROM records)"
        ).fetchone()
        assert orphans == 0
    with open_history(path) as history:
        stored = history.runs()
        for each in stored:
            run = history.load(each)
            assert len(run.records) == each.records == size
            for record in run.records:
                assert run.tokens_of(record) is not None
    return [each.note for each in stored]


def test_a_run_comes_back_as_it_was(path: Path) -> None:
    written = [made("bf16").with_tokens(tokens(seed=1)), made("int4", 5.5).with_tokens(tokens(seed=2)), made(kind="layers")]
    with open_history(path, create=True) as history:
        saved = history.save(written, command="llmq compare 'a b'", note="first")
        assert (saved.added, saved.known) == (3, 0)
        (stored,) = history.runs()
        run = history.load(stored)
    assert (stored.id, stored.command, stored.note, stored.llmq) == (saved.run, "llmq compare 'a b'", "first", llmq.__version__)
    assert (stored.models, stored.schemes, stored.kinds) == (("tiny",), ("bf16", "int4"), ("perplexity", "layers"))
    assert run.name == stored.id[:8]
    for before, after in zip(written, run.records, strict=True):
        assert to_json_line(before) == to_json_line(after)
        figures = run.tokens_of(after)  # after the database was closed
        if before.tokens is None:
            assert figures is None
        else:
            np.testing.assert_array_equal(figures.nll, before.tokens.nll, strict=True)


def test_records_are_kept_once(path: Path) -> None:
    first, second = made("bf16"), made("int4").with_tokens(tokens())
    with open_history(path, create=True) as history:
        one = history.save([first, second.with_tokens(None)], command="")
        again = history.save([first, second], command="")
        assert (again.run, again.added, again.known) == (one.run, 0, 2)
        two = history.save([second, made("fp16")], command="")
        assert (two.added, two.known) == (1, 1)
        assert history.save([first, history.load(history.find(two.run)).records[0]], command="").run is None  # of two runs
        assert history.save([], command="").run is None
        assert [run.records for run in history.runs()] == [1, 2]


def test_token_figures_that_come_later_are_kept(path: Path) -> None:
    record = made().with_tokens(tokens())
    bare = record.with_tokens(None).model_copy(update={"tokens": None})
    with open_history(path, create=True) as history:
        history.save([bare], command="")
        run = history.load(history.find("latest"))
        with pytest.raises(InputError, match="does not hold the token figures of the perplexity record of int4"):
            run.tokens_of(run.records[0])
        history.save([record], command="")
    assert run.tokens_of(run.records[0]).sha256 == record.tokens.sha256


def test_records_of_older_schemas_are_kept(path: Path) -> None:
    from llmq.results.store import parse_line

    data = json.loads(to_json_line(made()))
    del data["details"], data["tokens_sha256"], data["subject"]["kv_cache"]
    old = [parse_line(json.dumps(data | {"schema_version": version, "id": f"{version:032x}"}), "here") for version in (1, 2)]
    with open_history(path, create=True) as history:
        history.save([*old, made()], command="")
        run = history.load(history.find("latest"))
    assert [record.schema_version for record in run.records] == [1, 2, 3]


def test_lists_are_filtered_and_newest_first(path: Path) -> None:
    with open_history(path, create=True) as history:
        for day, (model, scheme) in enumerate([("a", "int4"), ("b", "int4"), ("a", "bf16")]):
            record = made(scheme, model=model, kind="decode" if day else "quantize")
            history.save([record], command=str(day), created_at=START + timedelta(days=-day))
        commands = [[run.command for run in history.runs(**asked)] for asked in (
            {}, {"model": "a"}, {"scheme": "int4"}, {"model": "b", "scheme": "bf16"}, {"kind": "decode"}, {"limit": 2},
        )]  # fmt: skip
    assert commands == [["0", "1", "2"], ["0", "2"], ["0", "1"], [], ["1", "2"], ["0", "1"]]


def test_runs_are_found_by_short_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(["aabbccdd" + "0" * 24, "aabb1111" + "0" * 24, "1234abcd" + "0" * 24])
    monkeypatch.setattr("llmq.results.history.uuid4", lambda: type("Fixed", (), {"hex": next(ids)}))
    with open_history(path) as history, pytest.raises(UsageError, match="holds no runs"):
        history.find("latest")
    assert not path.exists()  # reading makes nothing
    with open_history(path, create=True) as history:
        for day in range(3):
            history.save([made()], command=str(day), created_at=START + timedelta(days=day))
        named = {spec: history.find(spec).command for spec in ("latest", "latest~0", "latest~2", "aabbc", "AABB1", "12")}
        assert named == {"latest": "2", "latest~0": "2", "latest~2": "0", "aabbc": "0", "AABB1": "1", "12": "2"}
        for spec, said in {
            "aabb": r"beginning of 2 runs \(aabb1111, aabbccdd\); write more",
            "ff": "no run 'ff' in history .*the newest is 1234abcd",
            "latest~3": "before the first of 3 runs",
            "latest-1": "no run 'latest-1'",
            "%": "no run '%'",
        }.items():
            with pytest.raises(UsageError, match=said):
                history.find(spec)


def test_deleting_forgets_what_no_other_run_has(path: Path) -> None:
    shared, own = tokens(seed=1), tokens(300_000, seed=2)
    with open_history(path, create=True) as history:
        history.save([made().with_tokens(shared)], command="kept")
        small = path.stat().st_size
        gone = history.save([made().with_tokens(shared), made().with_tokens(own)], command="gone")
        assert path.stat().st_size > small + 1_000_000
        history.delete(gone.run)
        assert path.stat().st_size <= small + 8192  # what was deleted gives its space back
        history.annotate(history.find("latest").id, "a note")
    assert check_whole(path, 1) == ["a note"]


def test_a_record_that_json_cannot_hold_is_refused_whole(path: Path) -> None:
    with open_history(path, create=True) as history:
        with pytest.raises(OutputError, match="metric perplexity is nan"):
            history.save([made(), made(value=float("nan"))], command="")
        assert history.runs() == []


def _write_runs(path: Path, name: str, count: int, barrier: Barrier | None = None) -> None:
    if barrier is not None:
        barrier.wait()
    for index in range(count):
        records = [made().with_tokens(tokens(20_000, seed=hash((name, index, n)) % 2**32)) for n in range(3)]
        with open_history(path, create=True) as history:
            history.save(records, command="", note=f"{name} {index}")


@pytest.mark.parametrize("_", range(3))  # who makes the tables is another race each time
def test_several_processes_write_at_once(path: Path, _: int) -> None:
    names = "abcd"
    barrier = FORK.Barrier(len(names))
    writers = [FORK.Process(target=_write_runs, args=(path, name, 6, barrier)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(check_whole(path, 3)) == sorted(f"{name} {index}" for name in names for index in range(6))


def _wait_for(path: Path, note: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.is_file():
            with open_history(path, create=True) as history:
                if any(run.note == note for run in history.runs()):
                    return
        time.sleep(0.02)
    pytest.fail(f"no run {note!r} within a minute")


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_leaves_whole_runs(path: Path) -> None:
    moments = random.Random(1)
    before = 0
    for attempt in range(6):
        # they share nothing but the database: whoever is killed inside a lock of Python's would leave the other waiting
        victim = FORK.Process(target=_write_runs, args=(path, f"victim {attempt}", 10_000))
        other = FORK.Process(target=_write_runs, args=(path, f"other {attempt}", 4))
        victim.start()
        other.start()
        _wait_for(path, f"victim {attempt} 0")
        time.sleep(moments.uniform(0, 0.2))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        other.join()
        assert (victim.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
        notes = check_whole(path, 3)
        assert sum(note.startswith(f"other {attempt}") for note in notes) == 4
        killed = sorted(int(note.rpartition(" ")[2]) for note in notes if note.startswith(f"victim {attempt}"))
        assert killed == list(range(len(killed)))  # every run before the kill is there
        before += len(killed)
    assert before > 0


def _die_in_the_middle(path: Path) -> None:
    real = History._insert

    def insert(self: History, run: str, position: int, record: object, line: str) -> None:
        if position == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, run, position, record, line)  # type: ignore[arg-type]

    History._insert = insert  # type: ignore[method-assign]
    with open_history(path, create=True) as history:
        history._connection.execute("PRAGMA cache_size = 10")  # pages go to the file before the transaction ends
        history.save([made().with_tokens(tokens(500_000, seed=n)) for n in range(3)], command="", note="torn")


def test_a_kill_in_the_middle_of_a_transaction_takes_it_back(path: Path) -> None:
    with open_history(path, create=True) as history:
        history.save([made().with_tokens(tokens())] * 1, command="", note="whole")
    size = path.stat().st_size
    victim = FORK.Process(target=_die_in_the_middle, args=(path,))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert path.stat().st_size > size + 1_000_000  # the file was half-written; its journal takes that back
    assert check_whole(path, 1) == ["whole"]
    assert path.stat().st_size == size


def test_an_older_layout_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_history(path, create=True) as history:
        history.save([made().with_tokens(tokens())], command="", note="old")
    later = (
        ("ALTER TABLE runs ADD COLUMN tag TEXT NOT NULL DEFAULT 'none'",),
        ("CREATE TABLE tags (name TEXT)", "INSERT INTO tags SELECT tag || number FROM runs"),
    )
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, *later))
    with open_history(path) as history:
        assert history._connection.execute("SELECT name FROM tags").fetchall() == [("none1",)]
        assert history._connection.execute("PRAGMA user_version").fetchone() == (3,)
    assert check_whole(path, 1) == ["old"]  # and opening it again changes nothing more


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_history(path, create=True) as history:
        history.save([made().with_tokens(tokens())], command="", note="old")
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, ("CREATE TABLE a (b)", "no SQL at all")))
        with pytest.raises(OutputError, match=r"cannot use history .*syntax error"), open_history(path):
            pass
    assert path.read_bytes() == before


def test_a_newer_layout_is_refused(path: Path) -> None:
    with open_history(path, create=True) as history:
        history._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="has version 99 of its layout, and this llmq knows up to 1; use the llmq that wrote it"):
        open_history(path, create=True).__enter__()


def test_files_that_are_no_history(tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.db", tmp_path / "foreign.db"
    text.write_text("no database at all, but longer than the header of one " * 5)
    with pytest.raises(InputError, match=r"text\.db is damaged, or no database"):
        open_history(text).__enter__()
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    with pytest.raises(InputError, match=r"foreign\.db is a database of another program"):
        open_history(foreign, create=True).__enter__()
    with pytest.raises(OutputError, match=r"cannot use history .*unable to open"):
        open_history(tmp_path).__enter__()
    with pytest.raises(OutputError, match=r"cannot make .* for history"):
        open_history(text / "below" / "h.db", create=True).__enter__()


def test_a_lock_is_waited_for_and_then_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    with open_history(path, create=True) as history:
        history._connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OutputError, match="was locked by another process for 0 s"), open_history(path, create=True) as other:
            other.save([made()], command="")


def test_where_history_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert history_path({"LLMQ_HISTORY": ""}) is None
    assert history_path({"LLMQ_HISTORY": " off "}) is None
    assert history_path({"LLMQ_HISTORY": "/a/b.db"}) == Path("/a/b.db")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert history_path({}).name == "history.db"
    assert history_path() is None  # in the tests, so that they leave the user's alone
