"""Overrides: their text, what they match, and what contradicts."""

from __future__ import annotations

import pytest

from llmq.errors import UsageError
from llmq.schemes.overrides import Override, assign_overrides

FQNS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def test_the_text_is_read_and_written() -> None:
    override = Override.parse("*.down_proj=int4:group_size=32,symmetric=true")
    assert override == Override("*.down_proj", "int4", {"group_size": "32", "symmetric": "true"})
    assert str(override) == "*.down_proj=int4:group_size=32,symmetric=true"
    assert Override.parse(str(override)).resolve() == override.resolve()
    assert str(Override.parse(" lm_head = int8-weight-only ")) == "lm_head=int8-weight-only"
    assert str(Override.parse("*=int4:group_size=128")) == "*=int4"  # the default says itself
    again = Override(**override.to_json())
    assert again.resolve() == override.resolve()
    assert again.options["group_size"] == 32


@pytest.mark.parametrize(
    "text", ["", "int4", "=int4", "*.q_proj=", "*.q_proj=:group_size=32", "*=int4:", "*=int4:group_size", "*=int4:group_size=,"]
)
def test_texts_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="PATTERN=SCHEME"):
        Override.parse(text)


def test_an_option_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"twice \(32 and 64\)"):
        Override.parse("*=int4:group_size=32,group_size=64")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("*=int5", "unknown scheme 'int5'"),
        ("*=int4:groupsize=32", "Did you mean 'group_size'"),
        ("*=int4:group_size=48", "group_size of scheme int4 must be 32"),
        ("lm_head=bf16", "--skip 'lm_head'"),
    ],
)
def test_schemes_and_options_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        assign_overrides([Override.parse(text)], FQNS)


def test_linears_get_the_scheme_whose_pattern_matches() -> None:
    overrides = [Override.parse("*.layers.0.mlp.*=int4:group_size=32"), Override.parse("lm_head=int8-weight-only")]
    assigned = assign_overrides(overrides, FQNS)
    assert {fqn: resolved.name for fqn, resolved in assigned.items()} == {FQNS[1]: "int4", FQNS[3]: "int8-weight-only"}
    assert assigned[FQNS[1]].options_json()["group_size"] == 32
    assert assign_overrides([], FQNS) == {}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"'\*\.dwon_proj' matches no linear.*Did you mean 'down_proj'"):
        assign_overrides([Override.parse("*.dwon_proj=int4")], FQNS)


def test_overrides_that_contradict_each_other_are_errors() -> None:
    same = [Override.parse("*.down_proj=int4"), Override.parse("*.layers.1.*=int4:group_size=128")]
    assert assign_overrides(same, FQNS)[FQNS[2]].name == "int4"  # both ask for the same
    different = [Override.parse("*.down_proj=int4"), Override.parse("*.layers.1.*=int4:group_size=64")]
    with pytest.raises(UsageError, match=r"different things of model\.layers\.1\.mlp\.down_proj"):
        assign_overrides(different, FQNS)
    with pytest.raises(UsageError, match="different things"):
        assign_overrides(different[::-1], FQNS)  # no order decides


def test_a_linear_that_is_skipped_cannot_be_overridden() -> None:
    with pytest.raises(UsageError, match=r"left alone by --skip '\*\.layers\.1\.\*'"):
        assign_overrides([Override.parse("*.down_proj=int4")], FQNS, skip=["*.layers.1.*"])
