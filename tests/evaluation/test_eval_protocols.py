from __future__ import annotations

import random
import re

import pytest
import torch

from llmq.calibration.corpus import TextSource, text_from_string
from llmq.errors import TextError, TokenizerError, UsageError
from llmq.evaluation.detokenize import detokenize_wikitext
from llmq.evaluation.protocols import (
    LlamaCpp,
    LmEvalWord,
    PerplexityProtocol,
    Windows,
    check_length,
    default_length,
    protocol_names,
    resolve_protocol,
    rolling_windows,
)

NAMES = sorted(protocol_names())


def _resolve(name: str, **params: object) -> PerplexityProtocol:
    return resolve_protocol(name, params, context=64)


def test_windows_are_one_stream_with_one_bos(chars, essay) -> None:
    stream = [126, *map(ord, essay.joined())]
    pieces = _resolve("windows", length=10).cut(chars, essay)
    assert len(pieces.windows) == len(stream) // 10
    for index, window in enumerate(pieces.windows):
        chunk = stream[index * 10 : index * 10 + 10]
        assert window.inputs.tolist() == chunk[:-1]
        assert window.targets.tolist() == chunk[1:]
    assert pieces.documents is None
    assert pieces.bos == "one, at the start of the text"


def test_llamacpp_scores_the_second_half_after_bos(chars, essay) -> None:
    stream = [126, *map(ord, essay.raw().removesuffix("\n"))]
    pieces = _resolve("llamacpp", length=8).cut(chars, essay)
    assert len(pieces.windows) == len(stream) // 8
    for index, window in enumerate(pieces.windows):
        chunk = stream[index * 8 : index * 8 + 8]
        assert window.inputs.tolist() == [126, *chunk[1:7]]
        assert window.targets.tolist() == chunk[5:]  # logits of positions 4, 5, 6: length / 2 … length - 2
    # the token that BOS replaces is still what the previous window's text says it is
    assert pieces.windows[1].inputs[0] != stream[8]


def test_llamacpp_of_512_scores_255_positions(chars) -> None:
    text = text_from_string("x" * 3000, name="x", origin="test")
    windows = resolve_protocol("llamacpp", {"length": 512}, context=512).cut(chars, text).windows
    assert [window.targets.numel() for window in windows] == [255] * 5


def test_lmeval_word_scores_every_token_of_every_page_once(chars, essay) -> None:
    pieces = _resolve("lmeval-word", length=16).cut(chars, essay)
    pages = essay.documents()
    assert pieces.documents is not None
    assert len(pages) == len(pieces.documents) == 3
    for number, page in enumerate(pages):
        targets = torch.cat([window.targets for window in pieces.windows if window.document == number])
        assert targets.tolist() == [ord(letter) for letter in detokenize_wikitext(page)]
        assert pieces.documents[number].words == len(re.split(r"\s+", page))
        assert pieces.documents[number].bytes == len(page.encode())
    first_of_page = [next(w for w in pieces.windows if w.document == number) for number in range(3)]
    assert all(window.inputs[0] == 126 for window in first_of_page)


@pytest.mark.parametrize("length", [2, 3, 7, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 8, 15, 16, 17, 33])
def test_rolling_windows_are_lm_evals(count: int, length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = [random.Random(count).randrange(100) for _ in range(count)]
    theirs = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(token_list=tokens, prefix_token=999, max_seq_len=length, context_len=1)
    ]
    # theirs is (context, continuation), and the model is given both without the last token
    expected = [((a + b)[-(length + 1) :][:-1], b) for a, b in theirs]
    assert [(a, b) for a, b in rolling_windows(tokens, 999, length)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_limit_keeps_the_first_pieces(name: str, chars, essay) -> None:
    full = _resolve(name, length=16).cut(chars, essay).windows
    limited = _resolve(name, length=16, limit=2).cut(chars, essay).windows
    assert 0 < len(limited) < len(full)
    for short, long in zip(limited, full, strict=False):
        assert torch.equal(short.inputs, long.inputs)
        assert torch.equal(short.targets, long.targets)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_part_of_the_description(name: str) -> None:
    described = [_resolve(name, **params).describe() for params in ({}, {"length": 32}, {"limit": 3}, {"length": 32, "limit": 3})]
    assert all(one.name == name for one in described)
    assert len({str(one.params) for one in described}) == 4
    assert described[0].params == {"length": 64, "limit": None}


@pytest.mark.parametrize(("context", "length"), [(256, 256), (2048, 2048), (131072, 2048)])
def test_default_length(context: int, length: int) -> None:
    assert default_length(context) == length
    assert resolve_protocol("windows", {"length": None}, context=context).length == length


def test_text_from_the_command_line_is_converted() -> None:
    assert resolve_protocol("windows", {"length": "32", "limit": "5"}, context=64) == Windows(length=32, limit=5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        (
            "window",
            {},
            r"unknown perplexity protocol 'window'\. Did you mean 'windows'\? Available: llamacpp, lmeval-word, windows",
        ),
        ("windows", {"lenght": 4}, r"no parameter 'lenght'\. Did you mean 'length'\?"),
        ("windows", {"length": 1}, r"parameter length of protocol windows is 1: .*greater than or equal to 4"),
        ("llamacpp", {"limit": 0}, r"parameter limit of protocol llamacpp is 0"),
        ("lmeval-word", {"length": "long"}, r"parameter length of protocol lmeval-word is 'long'"),
        ("windows", {"length": 128}, r"windows of 128 tokens, but the model reads at most 64; choose a length of at most 64"),
    ],
)
def test_what_cannot_be_says_so(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_protocol(name, params, context=64)


def test_check_length_admits_the_context_itself() -> None:
    check_length(Windows(length=64), 64)
    with pytest.raises(UsageError, match="at most 63"):
        check_length(Windows(length=64), 63)


def test_a_tokenizer_without_bos(make_chars, essay) -> None:
    no_bos = make_chars(bos_id=None)
    windows = Windows(length=8).cut(no_bos, essay)
    assert windows.windows[0].inputs.tolist() == [ord(letter) for letter in essay.joined()[:7]]
    assert windows.bos == "none: the tokenizer has no BOS"
    chunks = LlamaCpp(length=8).cut(no_bos, essay)
    assert chunks.windows[1].inputs.tolist() == [ord(letter) for letter in essay.raw()[8:15]]
    assert chunks.bos == "none: the tokenizer has no BOS"
    pages = LmEvalWord(length=8).cut(no_bos, essay)
    assert pages.windows[0].inputs[0] == no_bos.eos_id
    assert pages.bos.startswith("EOS before each document")
    with pytest.raises(TokenizerError, match=r"neither BOS nor EOS.*choose the protocol windows"):
        LmEvalWord(length=8).cut(make_chars(bos_id=None, eos_id=None), essay)


@pytest.mark.parametrize("kind", [Windows, LlamaCpp])
def test_a_short_text_says_what_would_do(kind: type[PerplexityProtocol], chars) -> None:
    text = text_from_string("short", name="note", origin="note.txt")
    with pytest.raises(TextError, match=r"text note has \d+ tokens, too few for one window of 32"):
        kind(length=32).cut(chars, text)
    assert len(LmEvalWord(length=32).cut(chars, text).windows) == 1  # a document may be shorter than a window


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_text_is_one_document(name: str, chars) -> None:
    text = TextSource("plain", "test", ("First line.", "", "Second one, of a text with no headings."))
    assert not text.is_wikitext
    pieces = _resolve(name, length=16).cut(chars, text)
    assert {window.document for window in pieces.windows} == {0}
    if name == "lmeval-word":
        scored = torch.cat([window.targets for window in pieces.windows])
        assert chars.decode(scored.tolist()) == "First line.\n\nSecond one, of a text with no headings.\n"


@pytest.mark.wikitext
def test_wikitext_has_its_published_size(wikitext) -> None:
    from llmq.calibration.corpus import resolve_text

    text = resolve_text(wikitext, split="test")
    assert text.sha256 == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"  # of wiki.test.raw
    assert sum(len(row.encode()) + 4 for row in text.rows) == 1_305_088  # of the split in `datasets`
    assert len(text.joined()) == sum(map(len, text.rows)) + 2 * (len(text.rows) - 1)
