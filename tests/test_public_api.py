"""The public names: every one resolves, and no other is promised."""

from __future__ import annotations

import pytest

import llmq


@pytest.mark.parametrize("name", llmq.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(llmq, name) is not None
    assert name in dir(llmq)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = llmq.quantise
