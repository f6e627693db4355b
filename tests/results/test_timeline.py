"""A metric over time: what shares an axis, what does not, and what is drawn; and the tables of a run of any kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import made

from llmq.errors import OutputError, UsageError
from llmq.results.run_table import tables_of
from llmq.results.timeline import draw, timeline


def test_a_line_a_scheme_in_the_order_of_time() -> None:
    records = [made("int4", 5.0, day=2), made("bf16", 4.0, day=1), made("int4", 5.5, day=0), made(kind="layers", metric="sqnr")]
    (panel,) = timeline(records, "perplexity")
    assert [(one.label, [metric.value for _, metric in one.points]) for one in panel.series] == [
        ("int4", [5.5, 5.0]),
        ("bf16", [4.0]),
    ]
    assert panel.title == "tiny, windows v1, Fast 9000, threads 2"


def test_what_must_not_be_compared_gets_panels_of_its_own() -> None:
    other = {"window": 512}
    panels = timeline([made(value=1.0), made(value=2.0, params=other), made(value=3.0, model="big")], "perplexity.perplexity")
    assert [panel.title for panel in panels] == [
        "tiny, windows v1, Fast 9000, threads 2, window 256",
        "tiny, windows v1, Fast 9000, threads 2, window 512",
        "big, windows v1, Fast 9000, threads 2, window 256",
    ]
    with pytest.raises(UsageError, match="measured in 7 ways that cannot share an axis"):
        timeline([made(params={"window": n}) for n in range(7)], "perplexity")


def test_metrics_are_named_with_their_kind_where_several_have_them() -> None:
    speed = [made(kind=kind, metric="tokens_per_s") for kind in ("decode", "prefill")]
    with pytest.raises(UsageError, match=r"several kinds of records; name one: decode\.tokens_per_s, prefill\.tokens_per_s"):
        timeline(speed, "tokens_per_s")
    assert len(timeline(speed, "decode.tokens_per_s")[0].series[0].points) == 1
    with pytest.raises(UsageError, match=r"Did you mean 'decode\.tokens_per_s'"):
        timeline(speed, "decode.token_per_s")
    with pytest.raises(UsageError, match="history has no records"):
        timeline([], "kl_mean")


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_pictures(tmp_path: Path, suffix: str, begins: bytes) -> None:
    out = tmp_path / f"new/plot{suffix}"
    panels = timeline([made("int4", day=0), made("int4", day=9), made("bf16", params={"window": 1})], "perplexity")
    draw(panels, "perplexity", out)
    assert out.read_bytes().startswith(begins)
    with pytest.raises(OutputError, match="exists already"):
        draw(panels, "perplexity", out)
    draw(panels, "perplexity", out, force=True)
    with pytest.raises(UsageError, match=r"written as \.png or \.svg; got plot\.pdf"):
        draw(panels, "perplexity", tmp_path / "plot.pdf")
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_records_that_may_share_a_table_do() -> None:
    shared, layers = tables_of([made("int4"), made("bf16"), made(kind="layers", metric="sqnr", value=30.0)])
    assert [row[0] for row in shared.rows] == ["int4", "bf16"]
    assert layers.rows == (("sqnr", "30.00 ± 0.25"),)


def test_records_that_may_not_are_listed_by_what_tells_them_apart() -> None:
    (few,) = tables_of([made(params={"window": n, "same": "yes"}) for n in (1, 2)])
    assert [column.heading for column in few.columns] == ["metric", "int4 window=1", "int4 window=2"]
    assert few.header["protocol"] == "windows v1; same yes"
    (many,) = tables_of([made(kind="kernel", params={"rows": n}, value=float(n)) for n in range(1, 7)])
    assert [column.heading for column in many.columns] == ["record", "perplexity"]
    assert many.rows[5] == ("int4 rows=6", "6.00 ± 0.25")
