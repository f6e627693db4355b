"""Which records of several runs may be compared, and what keeps the others apart."""

from __future__ import annotations

import pytest
from report_runs import HERE, SCHEMES, bandwidth_record, example_records, example_run, layers_record

from llmq.errors import UsageError
from llmq.results.groups import comparable_groups
from llmq.results.run import run_in_memory
from llmq.results.table import check_comparable, first_difference


def test_runs_that_agree_are_one_group() -> None:
    first = example_run("a", {"bf16": SCHEMES["bf16"]})
    second = example_run("b", {"int4-gptq": SCHEMES["int4-gptq"]})
    (group,) = comparable_groups([first, second])
    assert group.runs == ["a", "b"]
    assert group.records == [*first.records, *second.records]
    assert group.apart is None


def test_a_record_of_two_runs_counts_once() -> None:
    (group,) = comparable_groups([example_run("a"), example_run("b")])
    assert len(group.records) == len(example_records())
    assert group.runs == ["a", "b"]


def test_another_protocol_is_another_group_and_says_which_field() -> None:
    first, second = comparable_groups([example_run("a"), example_run("b", length=512)])
    assert (first.runs, second.runs) == (["a"], ["b"])
    assert second.apart is not None
    assert (second.apart.kind, second.apart.field, second.apart.values) == ("perplexity", "length", (256, 512))
    assert any(record.kind == "decode" for record in second.records)  # a run that agrees with itself stays whole


def test_a_run_that_does_not_agree_with_itself_is_taken_apart() -> None:
    records = [*example_records({"bf16": SCHEMES["bf16"]}), *example_records({"bf16": SCHEMES["bf16"]}, length=512)]
    first, second = comparable_groups([run_in_memory("a", records)])
    assert {record.protocol.params.get("length") for record in first.records} == {256, None}
    assert {record.protocol.params.get("length") for record in second.records} == {512}


def test_another_machine_is_another_group() -> None:
    moved = [
        record.model_copy(update={"id": f"{record.id}-2", "environment": HERE.model_copy(update={"cpu": "Slow 1"})})
        for record in example_records()
    ]
    first, second = comparable_groups([example_run("a"), run_in_memory("b", moved)])
    assert second.apart is not None
    assert (second.apart.kind, second.apart.field, second.apart.values) == ("", "cpu", ("Fast 9000", "Slow 1"))
    assert len(first.records) == len(second.records)


def test_records_of_single_linears_join_and_those_of_machines_are_passed_over() -> None:
    extra = run_in_memory("b", [layers_record(), bandwidth_record()])
    (group,) = comparable_groups([example_run("a"), extra])
    assert {record.kind for record in group.records} == {"perplexity", "divergence", "prefill", "decode", "layers"}


def test_nothing_is_no_group() -> None:
    assert comparable_groups([]) == []
    assert comparable_groups([run_in_memory("a", [bandwidth_record()])]) == []


def test_the_difference_is_the_error() -> None:
    records = [*example_records({"bf16": SCHEMES["bf16"]}), *example_records({"int4-gptq": SCHEMES["int4-gptq"]}, length=512)]
    found = first_difference(records)
    assert found is not None
    assert found.schemes == ("bf16", "int4-gptq")
    with pytest.raises(UsageError, match=r"^perplexity records of length 256 \(bf16\) and 512 \(int4-gptq\) cannot share"):
        check_comparable(records)
    assert first_difference(example_records()) is None
