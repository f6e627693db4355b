"""The three kinds of tokenizer: told apart by content, exact round trips, and what is refused."""

from __future__ import annotations

import base64
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmq.errors import TokenizerError
from llmq.files import sha256_file
from llmq.model.tokenizer import StreamDecoder, Tokenizer, find_tokenizer, load_tokenizer, tokenizer_kind

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    " = Valkyria Chronicles III = \n\n The game's 12,345th copy @-@ sold !",
    "naïve café — “quotes”, 東京都, Привет, 🙂🙃 and a\ttab",
    "  two  spaces\n\n\nand lines \r\n",
    "",
    " ",
    "<s>not special</s>",
]


def train_bpe(folder: Path, *, name: str = "tokenizer.json") -> Path:
    """A byte-level BPE of 300 tokens and two special ones."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    model.enable_truncation(5)  # files carry such settings, and they must not cut a text
    model.enable_padding(length=5)
    model.save(str(folder / name))
    return folder / name


def write_ranks(folder: Path) -> Path:
    """A file as Meta's for Llama 3: all bytes, then some merges in order of rank."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"he", b" t", b"the", b" the", b"in", b"er", b"an", b"re", b"on", b" a", b"ing", b"12", b"123", b"\n\n"]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens)]
    path = folder / "tokenizer.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def demo(_: Path) -> Path:
    return Path(__file__).parents[2] / "llmq" / "assets" / "wt2-8m" / "tokenizer.model"


MAKERS: dict[str, Callable[[Path], Path]] = {"sentencepiece": demo, "tokenizers": train_bpe, "tiktoken": write_ranks}


@pytest.fixture(params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MAKERS[request.param](tmp_path)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [load_tokenizer(make(tmp_path_factory.mktemp(kind))) for kind, make in MAKERS.items()]


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(path: Path, text: str) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    if text and text != "<s>not special</s>":
        assert len(ids) < len(text.encode()) or text == " "


@pytest.mark.parametrize("text", TEXTS)
def test_stories_round_trip(stories260k: Path, text: str) -> None:
    """Trained with SentencePiece's own normalisation, which makes one space of several."""
    tokenizer = load_tokenizer(stories260k)
    assert tokenizer.vocab_size == 512
    plain = " ".join(text.split())
    assert tokenizer.decode(tokenizer.encode(plain)) == plain


def test_the_name_of_the_file_does_not_matter(path: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed" / "weights.bin"
    renamed.parent.mkdir()
    shutil.copy(path, renamed)
    original, copy = load_tokenizer(path), load_tokenizer(renamed)
    assert copy.kind == original.kind == tokenizer_kind(path)
    assert find_tokenizer(renamed.parent) == renamed
    assert copy.encode(TEXTS[0]) == original.encode(TEXTS[0])
    assert copy.sha256 == sha256_file(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_survives_and_streams(all_kinds: list[Tokenizer], text: str) -> None:
    for tokenizer in all_kinds:
        ids = tokenizer.encode(text)
        if "<|" not in text:  # the spelling of a special token is that token, which has no text
            assert tokenizer.decode(ids) == text
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_any_tokens_stream(all_kinds: list[Tokenizer]) -> None:
    """Tokens need not be what an encoder would make: a model may stop within a character, or start with a space."""
    generator = random.Random(5)
    for tokenizer in all_kinds:
        for _ in range(200):
            ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(12))]
            assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids), (tokenizer.kind, ids)


def test_a_character_of_several_tokens_streams_whole(all_kinds: list[Tokenizer]) -> None:
    for tokenizer in all_kinds:
        ids = tokenizer.encode("a🙂b")
        assert len(ids) >= 4
        pieces = stream(tokenizer, ids)
        assert [piece for piece in pieces if "🙂" in piece]
        assert not any("\ufffd" in piece for piece in pieces)
        half = stream(tokenizer, ids[:-2])  # the stream ends within the character
        assert "".join(half[:-1]) == "a"
        assert "\ufffd" in half[-1]


def test_bos_is_only_added_when_asked(all_kinds: list[Tokenizer]) -> None:
    for tokenizer in all_kinds:
        if tokenizer.bos_id is None:
            continue
        ids = tokenizer.encode("text")
        assert tokenizer.encode("text", bos=True) == [tokenizer.bos_id, *ids]
        assert tokenizer.bos_id not in ids
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == "text"


def test_ids_that_are_not_there(all_kinds: list[Tokenizer]) -> None:
    for tokenizer in all_kinds:
        for token in (-1, tokenizer.vocab_size):
            with pytest.raises(TokenizerError, match=rf"token {token} is not in tokenizer"):
                tokenizer.decode([token])


def test_special_tokens_of_the_demo(wt2_8m: Path) -> None:
    tokenizer = load_tokenizer(wt2_8m)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == ("sentencepiece", 4096, 1, 2)


def test_special_tokens_of_tokenizer_json(tmp_path: Path) -> None:
    path = train_bpe(tmp_path)
    assert (load_tokenizer(path).bos_id, load_tokenizer(path).eos_id) == (None, None)
    with pytest.raises(TokenizerError, match="has no BOS token"):
        load_tokenizer(path).encode("text", bos=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "bos_token_id": 0, "eos_token_id": [1, 0]}')
    assert (load_tokenizer(path).bos_id, load_tokenizer(path).eos_id) == (0, 1)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|end|>"}, "eos_token": "<|begin|>"}')
    assert (load_tokenizer(path).bos_id, load_tokenizer(path).eos_id) == (1, 0)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|end|>"}')
    assert (load_tokenizer(path).bos_id, load_tokenizer(path).eos_id) == (None, 1)
    assert load_tokenizer(path).encode("a<|end|>") == [*load_tokenizer(path).encode("a"), 1]
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|absent|>"}')
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json says that bos_token is '<\|absent\|>'"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(path)


def test_a_long_text_is_not_cut(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_bpe(tmp_path))  # its file asks for truncation and padding to 5 tokens
    assert tokenizer.decode(tokenizer.encode("word " * 50)) == "word " * 50
    assert len(tokenizer.encode("a")) == 1


def test_llama3_special_tokens_and_split(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_ranks(tmp_path))
    base = 256 + 15
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (base + 256, base, base + 1)
    chat = "<|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
    ids = tokenizer.encode(chat)
    assert (ids[0], ids[-4], ids[-1]) == (base + 6, base + 7, base + 9)
    assert tokenizer.decode(ids) == "user\n\nthe"
    assert tokenizer.encode("<|python_tag|><|reserved_special_token_247|>") == [base + 10, base + 255]
    # digits go in threes from the left, so 4 stands alone; a space goes with the word after it
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234 the")] == ["123", "4", " the"]


def test_llama3_ranks_make_the_tokens_of_byte_level_bpe(tmp_path: Path) -> None:
    """The rule, written out: split, then join the pair of lowest rank until none is left."""
    path = write_ranks(tmp_path)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in path.read_bytes().splitlines()}

    def merge(word: bytes) -> list[int]:
        parts = [bytes([byte]) for byte in word]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                return [ranks[part] for part in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    words = ["another", " thing", " in", " the", " restaurant", " on", " there"]
    expected = [token for word in words for token in merge(word.encode())]
    assert load_tokenizer(path).encode("".join(words)) == expected


@pytest.mark.parametrize("bos", [False, True])
def test_equal_to_transformers(tmp_path: Path, transformers: ModuleType, bos: bool) -> None:
    path = train_bpe(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>", "eos_token": "<|end|>"}')
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<|begin|>", eos_token="<|end|>")
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=bos) == ([theirs.bos_token_id] if bos else []) + expected


def test_what_is_preferred_in_a_folder(tmp_path: Path, wt2_8m: Path, stories260k: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    shutil.copy(wt2_8m / "tokenizer.model", tmp_path / "a.model")
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    shutil.copy(wt2_8m / "tokenizer.model", tmp_path / "b.model")  # the same file twice is no question
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    shutil.copy(stories260k / "tokenizer.model", tmp_path / "b.model")
    with pytest.raises(TokenizerError, match=r"more than one sentencepiece tokenizer \(a.model, b.model\)"):
        load_tokenizer(tmp_path)
    write_ranks(tmp_path)
    assert load_tokenizer(tmp_path).kind == "tiktoken"
    train_bpe(tmp_path)
    assert load_tokenizer(tmp_path).kind == "tokenizers"


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "holds no tokenizer")
    for content in (b"", b"hello", b'{"model_type": "llama"}'):
        (tmp_path / "tokenizer.model").write_bytes(content)
        refused(tmp_path / "tokenizer.model", "is not a tokenizer that llmq knows")


def test_damaged_tokenizers(tmp_path: Path, wt2_8m: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes((wt2_8m / "tokenizer.model").read_bytes()[:5000])
    refused(path, "is not a whole SentencePiece model")
    whole = train_bpe(tmp_path).read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:3000])
    refused(tmp_path / "tokenizer.json", "is not a whole tokenizer.json")
    empty = json.loads(whole)
    empty["added_tokens"], empty["model"]["vocab"], empty["model"]["merges"] = [], {}, []
    (tmp_path / "tokenizer.json").write_text(json.dumps(empty))
    refused(tmp_path / "tokenizer.json", "empty vocabulary")
    ranks = write_ranks(tmp_path).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(ranks)[:-3])
    refused(path, "ranks are not 0 to 270")
    path.write_bytes(b"".join([*ranks[:7], b"!! 7\n", *ranks[8:]]))
    refused(path, "is damaged at line 8")
    path.write_bytes(b"".join([*ranks[:9], *ranks[10:]]))
    refused(path, "ranks are not 0 to 269")
    path.write_bytes(b"".join(ranks[:200]))
    refused(path, "no token for byte 200 (56 are missing)")
