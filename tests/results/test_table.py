"""The comparison table: goldens, and everything that must not stand side by side."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from somewhere import HERE

from llmq.errors import UsageError
from llmq.results.markdown import is_fresh, to_markdown, update_marked_section
from llmq.results.record import Cache, Kind, Metric, Protocol, ResultRecord, Subject
from llmq.results.table import Column, Table, comparison_table

QUALITY = {"length": 256, "limit": None, "bos": "one, at the start", "text": "wikitext-2 test", "text_sha256": "f" * 64} | {
    "n_windows": 100,
    "n_scored_tokens": 25500,
}
SPEED = {"batch_size": 1, "context": 128, "new_tokens": 64}
SIZES = {"bf16": (16.0, 16_800_000), "int4": (4.5, 6_900_000), "int8-weight-only": (8.06, 10_100_000)}


def record(
    kind: Kind,
    scheme: str,
    metrics: dict[str, tuple[float, float | None]],
    *,
    options: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    subject: dict[str, Any] | None = None,
    **fields: Any,
) -> ResultRecord:
    bits, nbytes = SIZES[scheme]
    return ResultRecord(
        kind=kind,
        subject=Subject(
            **{
                "model": "tiny",
                "checkpoint_sha256": "a" * 64,
                "tokenizer_sha256": "b" * 64,
                "scheme": scheme,
                "options": options or {},
                "bits_per_weight": bits,
                "size_bytes": nbytes,
                **(subject or {}),
            }
        ),
        protocol=Protocol(
            name="windows" if kind in ("perplexity", "divergence") else kind,
            version=1,
            params=(QUALITY if kind in ("perplexity", "divergence") else SPEED) | (params or {}),
        ),
        metrics={name: Metric(value=value, unit="1", stderr=stderr) for name, (value, stderr) in metrics.items()},
        environment=HERE.model_copy(update=environment or {}),
        **fields,
    )


def quality(scheme: str, ppl: float, kl: float, **more: Any) -> list[ResultRecord]:
    return [
        record("perplexity", scheme, {"perplexity": (ppl, 0.12), "nll": (3.1, 0.01)}, **more),
        record(
            "divergence",
            scheme,
            {"kl_mean": (kl, kl / 50), "top1_agreement": (0.9123, 0.0021), "delta_ln_perplexity": (0.0123, 0.0009)},
            **more,
        ),
    ]


def speed(scheme: str, rate: float, **more: Any) -> list[ResultRecord]:
    return [
        record("prefill", scheme, {"tokens_per_s": (1234.0, 21.0)}, **more),
        record(
            "decode",
            scheme,
            {"tokens_per_s": (rate, 1.4), "bandwidth_gbps": (12.34, None), "bandwidth_share": (0.512, None)},
            **more,
        ),
    ]


GOLDEN = """\
**model:** tiny (sha256 aaaaaaaaaaaa)  
**text:** wikitext-2 test (sha256 ffffffffffff)  
**protocol:** windows v1: length 256; bos one, at the start; windows 100; scored tokens 25,500  
**prefill:** batch size 1; context 128; new tokens 64  
**decode:** batch size 1; context 128; new tokens 64  
**machine:** Fast 9000, cpu, 2 threads, torch 2.13.0  
**kernels:** bf16: torch-dense (57); int4 group_size=32: aten-int4pack-cpu (56), torch-dense (1)  
**±:** one standard error  

| scheme             |   perplexity |        Δ ln ppl |  KL (nats/token) |     same top-1 | prefill tok/s | decode tok/s |       GB/s | bits/weight |    size |
| ------------------ | -----------: | --------------: | ---------------: | -------------: | ------------: | -----------: | ---------: | ----------: | ------: |
| bf16               | 24.12 ± 0.12 | 0.0123 ± 0.0009 |            0 ± 0 | 91.23 ± 0.21 % |     1234 ± 21 |   95.2 ± 1.4 | 12.3 (51%) |       16.00 | 16.8 MB |
| int4 group_size=32 | 26.50 ± 0.12 | 0.0123 ± 0.0009 |  0.0345 ± 0.0007 | 91.23 ± 0.21 % |     1234 ± 21 |  140.4 ± 1.4 | 12.3 (51%) |        4.50 | 6.90 MB |
| int8-weight-only   | 24.20 ± 0.12 | 0.0123 ± 0.0009 | (2.00 ± 0.04)e-5 | 91.23 ± 0.21 % |             – |            – |          – |        8.06 | 10.1 MB |

- int4 group_size=32: head left in bf16"""  # noqa: E501, W291


def test_golden() -> None:
    group = {"group_size": 32}
    kernels = {"aten-int4pack-cpu": 56, "torch-dense": 1}
    records = [
        *quality("bf16", 24.123, 0.0),
        *speed("bf16", 95.21, kernels={"torch-dense": 57}),
        *quality("int4", 26.5, 0.0345, options=group),
        *speed("int4", 140.4, options=group, kernels=kernels, notes=["head left in bf16"]),
        *quality("int8-weight-only", 24.2, 0.00002),
        record("bandwidth", "bf16", {"bandwidth_gbps": (1.0, None)}, params={"of": "another kind, passed over"}),
    ]
    assert to_markdown(comparison_table(records)) == GOLDEN


def test_what_nobody_measured_has_no_column() -> None:
    table = comparison_table([record("perplexity", "bf16", {"perplexity": (24.0, None)})])
    assert [column.heading for column in table.columns] == ["scheme", "perplexity", "bits/weight", "size"]
    assert table.rows == (("bf16", "24.00", "16.00", "16.8 MB"),)
    assert "decode" not in table.header
    assert [column.right for column in table.columns] == [False, True, True, True]


def test_word_perplexity_is_the_figure_of_its_protocol() -> None:
    table = comparison_table([record("perplexity", "bf16", {"perplexity": (24.0, None), "word_perplexity": (80.5, None)})])
    assert table.columns[1].heading == "word perplexity"
    assert table.rows[0][1] == "80.50"


def test_rows_of_one_scheme_are_told_apart_by_what_differs() -> None:
    options = [
        {"group_size": 32, "symmetric": False, "seed": 0},
        {"group_size": 128, "symmetric": False, "seed": 0},
        {"group_size": 32, "symmetric": True, "seed": 0},
    ]
    records = [record("perplexity", "int4", {"perplexity": (24.0, None)}, options=each) for each in options]
    records.append(record("perplexity", "int8-weight-only", {"perplexity": (24.0, None)}, options={"group_size": None}))
    assert [row[0] for row in comparison_table(records).rows] == [
        "int4 group_size=32 symmetric=False",
        "int4 group_size=128 symmetric=False",
        "int4 group_size=32 symmetric=True",
        "int8-weight-only",
    ]


def test_the_newest_record_counts_wherever_it_stands() -> None:
    now = datetime(2025, 1, 1, tzinfo=UTC)
    records = [
        record("perplexity", "bf16", {"perplexity": (value, None)}, created_at=now + timedelta(hours=hours))
        for value, hours in ((2.0, 1), (3.0, 2), (1.0, 0))
    ]
    table = comparison_table(records)
    assert table.rows[0][1] == "3.000"
    assert table.notes == ("2 older records of the same measurement left out.",)


def test_notes_of_all_rows_are_told_once() -> None:
    records = [record("perplexity", scheme, {"perplexity": (2.0, None)}, notes=["texts overlap"]) for scheme in ("bf16", "int4")]
    assert comparison_table(records).notes == ("texts overlap",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"length": 512}}, r"perplexity records of length 256 \(bf16\) and 512 \(int4\) cannot share a table"),
        ({"params": {"text_sha256": "0"}}, r"perplexity records of text_sha256 'f+' \(bf16\) and '0' \(int4\)"),
        ({"params": {"more": 1}}, r"perplexity records of more None \(bf16\) and 1 \(int4\)"),
        ({"environment": {"cpu": "Slow 1"}}, r"records of cpu 'Fast 9000' \(bf16\) and 'Slow 1' \(int4\)"),
        ({"environment": {"device": "cuda"}}, r"records of device 'cpu' \(bf16\) and 'cuda' \(int4\)"),
        ({"environment": {"packages": {"torch": "2.11.0"}}}, r"records of torch '2.13.0' \(bf16\) and '2.11.0' \(int4\)"),
        ({"environment": {"threads": 1}}, r"perplexity records of threads 2 \(bf16\) and 1 \(int4\)"),
        ({"subject": {"checkpoint_sha256": "c"}}, r"records of checkpoint_sha256 'a+' \(bf16\) and 'c' \(int4\)"),
        ({"subject": {"model": "other"}}, r"records of model 'tiny' \(bf16\) and 'other' \(int4\)"),
        ({"subject": {"tokenizer_sha256": "c"}}, r"records of tokenizer_sha256 'b+' \(bf16\) and 'c' \(int4\)"),
    ],
    ids=["window", "text", "one has more", "cpu", "device", "torch", "threads", "checkpoint", "model", "tokenizer"],
)
def test_what_differs_is_not_put_side_by_side(change: dict[str, Any], message: str) -> None:
    records = [
        record("perplexity", "bf16", {"perplexity": (2.0, None)}),
        record("perplexity", "int4", {"perplexity": (2.0, None)}, **change),
    ]
    with pytest.raises(UsageError, match=message):
        comparison_table(records)


def test_speed_and_quality_may_have_run_on_different_numbers_of_threads() -> None:
    records = [*quality("bf16", 24.0, 0.0), *speed("bf16", 95.0, environment={"threads": 1})]
    assert "perplexity 2, divergence 2, prefill 1, decode 1 threads" in comparison_table(records).header["machine"]


def test_a_speed_record_needs_no_tokenizer() -> None:
    records = [*quality("bf16", 24.0, 0.0), *speed("bf16", 95.0, subject={"tokenizer_sha256": None})]
    assert len(comparison_table(records).rows) == 1


def test_nothing_to_show() -> None:
    with pytest.raises(UsageError, match=r"no record of kind .* among 1 records"):
        comparison_table([record("kernel", "bf16", {})])


SMALL = Table("title", {}, (Column("a", right=False), Column("b | c")), (("x", "1"), ("a|b*\n`c`", "22")), ())
RENDERED = """\
| a            | b \\| c |
| ------------ | -----: |
| x            |      1 |
| a\\|b\\* \\`c\\` |     22 |"""


def test_markdown_of_odd_cells() -> None:
    assert to_markdown(SMALL) == RENDERED


DOCUMENT = "# Title\n<!-- begin speed -->\nold\n<!-- end speed -->\nrest\n"


def test_a_marked_section_is_replaced_and_then_fresh() -> None:
    assert not is_fresh(DOCUMENT, "speed", SMALL)
    updated = update_marked_section(DOCUMENT, "speed", SMALL)
    assert updated == f"# Title\n<!-- begin speed -->\n\n{RENDERED}\n\n<!-- end speed -->\nrest\n"
    assert is_fresh(updated, "speed", SMALL)
    assert update_marked_section(updated, "speed", SMALL) == updated
    assert not is_fresh(updated, "speed", "other text")
    assert is_fresh(update_marked_section(updated, "speed", "other text\n"), "speed", "other text")


@pytest.mark.parametrize(
    "document",
    ["nothing", "<!-- begin speed -->", DOCUMENT + DOCUMENT, "<!-- end speed --> <!-- begin speed -->"],
    ids=["none", "no end", "two", "reversed"],
)
def test_a_document_without_its_markers_is_refused(document: str) -> None:
    with pytest.raises(UsageError, match="needs one line '<!-- begin speed -->'"):
        update_marked_section(document, "speed", SMALL)


BF16_CACHE = {"kv_cache": Cache(dtype="bf16", bytes_per_token=4096, context_tokens=256)}
INT8_CACHE = {"kv_cache": Cache(dtype="int8", bytes_per_token=2304, context_tokens=256)}


def test_one_cache_is_said_above_the_table() -> None:
    table = comparison_table([*quality("bf16", 20, 0, subject=INT8_CACHE), *quality("int4", 21, 0.02, subject=INT8_CACHE)])
    assert table.header["KV cache"] == "int8, 2.30 kB a token, 590 kB a sequence at the context's limit of 256 tokens"
    assert [row[0] for row in table.rows] == ["bf16", "int4"]
    assert not any(column.heading.startswith("KV") for column in table.columns)
    assert table.title == "tiny: 2 schemes"


def test_several_caches_are_rows_of_their_own() -> None:
    records = [*quality("bf16", 20, 0, subject=BF16_CACHE), *quality("bf16", 20.1, 0.0002, subject=INT8_CACHE)]
    table = comparison_table([*records, *quality("int4", 21, 0.02, subject=INT8_CACHE)])
    assert [row[0] for row in table.rows] == ["bf16 kv=bf16", "bf16 kv=int8", "int4 kv=int8"]
    assert [column.heading for column in table.columns][-2:] == ["KV/token", "KV at limit"]
    assert [row[-2:] for row in table.rows] == [("4.10 kB", "1.05 MB"), ("2.30 kB", "590 kB"), ("2.30 kB", "590 kB")]
    assert table.title == "tiny: 2 schemes, 2 KV caches"
    assert "KV cache" not in table.header
    assert not table.notes  # no record gave way to another


def test_records_that_do_not_say_their_cache() -> None:
    old = comparison_table([*quality("bf16", 20, 0), *quality("int4", 21, 0.02)])
    assert "KV cache" not in old.header
    assert [row[0] for row in old.rows] == ["bf16", "int4"]
    assert not any(column.heading.startswith("KV") for column in old.columns)
    mixed = comparison_table([*quality("bf16", 20, 0), *quality("bf16", 20, 0, subject=BF16_CACHE)])
    assert [(row[0], row[-1]) for row in mixed.rows] == [("bf16 kv=unknown", "–"), ("bf16 kv=bf16", "1.05 MB")]
