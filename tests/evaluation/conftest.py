"""Fakes that are small enough to check by hand: a tokenizer of characters, a model that sees its context, and a short text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.calibration.corpus import TextSource, text_from_string
from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama
from llmq.model.tokenizer import Tokenizer


class CharTokenizer:
    """One token a character (of the first 126), BOS 126, EOS 127."""

    kind = "sentencepiece"
    path = Path("characters")
    vocab_size = 128

    def __init__(self, bos_id: int | None = 126, eos_id: int | None = 127, sha256: str = "c" * 64) -> None:
        self.bos_id, self.eos_id, self.sha256 = bos_id, eos_id, sha256

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return ([self.bos_id] if bos else []) + [min(ord(letter), 125) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token < 126)


@dataclass
class Sizes:
    vocab_size: int = 128
    max_position_embeddings: int = 64


class MeanModel(nn.Module):
    """The hidden state of a position is the mean of the embeddings up to it, so every token of the context matters."""

    def __init__(self, seed: int = 0, vocab_size: int = 128, context: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = Sizes(vocab_size, context)
        self.device = torch.device("cpu")
        self.embedding = torch.randn(vocab_size, 16, generator=generator)
        self.output = torch.randn(vocab_size, 16, generator=generator)
        self.batch_sizes: list[int] = []
        self.head_rows: list[int] = []

    def hidden(self, tokens: Tensor) -> Tensor:
        assert tokens.dtype == torch.int64
        assert tokens.shape[1] <= self.config.max_position_embeddings
        self.batch_sizes.append(tokens.shape[0])
        return self.embedding[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]

    def head(self, h: Tensor) -> Tensor:
        self.head_rows.append(h.shape[1])
        return h @ self.output.T


def reference_nll(model: MeanModel, inputs: Sequence[int], target: int) -> float:
    """-ln p(target | inputs), in double precision, one position at a time."""
    mean = model.embedding[list(inputs)].double().mean(0)
    return -float(torch.log_softmax(model.output.double() @ mean, -1)[target])


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """The fakes' tensors are tiny: threads would only wait for each other, above all on a busy machine."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def chars() -> CharTokenizer:
    return CharTokenizer()


@pytest.fixture
def make_chars() -> type[CharTokenizer]:
    return CharTokenizer


@pytest.fixture
def mean_model() -> MeanModel:
    return MeanModel()


@pytest.fixture
def make_model() -> type[MeanModel]:
    return MeanModel


@pytest.fixture
def exact_nll() -> Callable[[MeanModel, Sequence[int], int], float]:
    return reference_nll


@pytest.fixture
def essay() -> TextSource:
    """Three pages of WikiText's form, of different lengths."""
    pages = [
        " = Tides = \n \n The tide is a rise and fall of the sea , caused by the Moon 's pull . \n",
        " = Salt = \n \n Salt ( sodium chloride ) is a mineral . A war @-@ ship 's cargo was 1 @,@ 000 sacks . \n \n",
        " = Ink = \n \n Ink is a fluid . \n",
    ]
    return text_from_string(" \n" + "".join(pages), name="essay", origin="test")


@pytest.fixture(scope="session")
def demo(wt2_8m: Path) -> tuple[Llama, Tokenizer]:
    """The bundled checkpoint in fp32, and its tokenizer."""
    checkpoint = open_checkpoint(wt2_8m)
    return load_model(checkpoint, dtype=torch.float32), load_tokenizer_for(checkpoint)


@pytest.fixture(scope="session")
def llama() -> Llama:
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_position_embeddings=48,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            bos_token_id=126,
            eos_token_ids=(127,),
        )
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2:
            parameter.normal_(std=0.4)
    return model


def request_score(model: Llama, inputs: list[int], targets: list[int]) -> tuple[float, bool]:
    """ln p of the last tokens, and whether they are the most likely ones, one request at a time."""
    logits = model(torch.tensor([inputs]))[0, -len(targets) :].double().log_softmax(-1)
    score = logits.gather(1, torch.tensor(targets)[:, None]).sum()
    return float(score), logits.argmax(-1).tolist() == targets


@pytest.fixture
def exact_score() -> Callable[[Llama, list[int], list[int]], tuple[float, bool]]:
    return request_score
