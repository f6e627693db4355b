"""Generation: the tokens it yields, when it stops, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.generate import Sampling, decode_step, generate, prefill, sample
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama


@pytest.fixture
def model(make: Callable[[LlamaConfig], Llama], tiny_config: LlamaConfig) -> Llama:
    return make(dataclasses.replace(tiny_config, eos_token_ids=()))


def greedy_without_cache(model: Llama, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_is_the_argmax_of_the_full_forward(model: Llama) -> None:
    expected = greedy_without_cache(model, [3, 14, 15, 9], 30)
    assert len(set(expected)) > 3
    assert list(generate(model, [3, 14, 15, 9], max_new_tokens=30)) == expected


def test_prefill_and_decode_steps_of_a_batch(model: Llama, tokens: Tensor) -> None:
    expected = model(tokens)
    cache = KVCache(model.config, 2, 24, torch.float32, "cpu")
    logits = prefill(model, cache, tokens[:, :20])
    assert logits.shape == (2, 1, 61)
    assert torch.allclose(logits[:, 0], expected[:, 19], atol=1e-5)
    for position in range(20, 24):
        logits = decode_step(model, cache, tokens[:, position : position + 1], position)
        assert logits.shape == (2, 1, 61)
        assert torch.allclose(logits[:, 0], expected[:, position], atol=1e-5)


def test_stop_tokens_end_the_text_and_are_not_part_of_it(model: Llama) -> None:
    text = list(generate(model, [3, 14, 15, 9], max_new_tokens=30))
    end = next(i for i, token in enumerate(text) if token not in text[:i] and i > 3)
    assert list(generate(model, [3, 14, 15, 9], max_new_tokens=30, stop={text[end]})) == text[:end]
    ending = Llama(dataclasses.replace(model.config, eos_token_ids=(0, text[end])))
    ending.load_state_dict(model.state_dict(), assign=True)
    assert list(generate(ending, [3, 14, 15, 9], max_new_tokens=30)) == text[:end]
    assert list(generate(ending, [3, 14, 15, 9], max_new_tokens=30, stop=())) == text


def test_seed_decides(model: Llama) -> None:
    first, again, other = (
        list(generate(model, [3], max_new_tokens=30, sampling=Sampling(temperature=1.5, seed=seed))) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_consumer_keeps_its_own_grad_mode(model: Llama) -> None:
    for _ in generate(model, [3], max_new_tokens=3):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2), {0, 2}),
        (Sampling(1.0, top_k=9), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.5), {0}),  # 0.5 is reached by the first alone
        (Sampling(1.0, top_p=0.51), {0, 2}),
        (Sampling(1.0, top_p=1.0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=3, top_p=0.9), {0, 2, 1}),  # of 0.95: 0.53, 0.32, 0.16
        (Sampling(0.0), {0}),
    ],
)
def test_support_of_the_samples(sampling: Sampling, possible: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.15, 0.3, 0.05]]).log().expand(4000, 4)
    drawn = sample(logits, sampling, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 1)
    assert set(drawn.flatten().tolist()) == possible


def test_samples_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.15, 0.3, 0.05])
    n = 20000
    logits = (2 * probabilities.log()).expand(n, 4)  # at temperature 2 these are the probabilities themselves
    drawn = sample(logits, Sampling(2.0), torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(drawn, minlength=4)
    chi2 = ((counts - n * probabilities).square() / (n * probabilities)).sum()
    assert chi2 < 16.3  # 99.9th percentile, 3 degrees of freedom


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "the prompt has no tokens"),
        ([3, 61], 5, "prompt token 61 is not in the model's vocabulary of 61 tokens"),
        ([3, -1], 5, "prompt token -1"),
        ([3], 0, "max_new_tokens must be at least 1, got 0"),
        ([3] * 30, 11, "context of 40 tokens; shorten the prompt, or ask for at most 10 new tokens"),
        ([3] * 50, 1, "ask for at most 0 new tokens"),
    ],
)
def test_what_is_refused_at_once(model: Llama, prompt: list[int], count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(model, prompt, max_new_tokens=count)  # without taking a token from it


def test_the_whole_context_can_be_filled(model: Llama) -> None:
    assert len(list(generate(model, [3] * 30, max_new_tokens=10))) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or positive, got -0.1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ],
)
def test_sampling_values_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


ENGLISH = (
    "The castle was built in the 12th century and was rebuilt several times . It is one of the largest buildings in the "
    "north of England , and was used as a prison during the war . The church was opened to the public in 1923 ."
)


def pieces(folder: Path, text: str) -> list[int]:
    import sentencepiece

    return list(sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).encode(text))


def test_bundled_model_knows_english(demo_model: Llama, wt2_8m: Path) -> None:
    ids = torch.tensor(pieces(wt2_8m, ENGLISH))
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    losses = []
    for text in (ids, shuffled):
        tokens = torch.cat((torch.tensor([1]), text))[None]
        losses.append(float(cross_entropy(demo_model(tokens)[0, :-1].float(), tokens[0, 1:])))
    assert losses[0] < math.log(80) < math.log(400) < losses[1]


@pytest.mark.slow
@pytest.mark.wikitext
def test_bundled_model_has_the_perplexity_it_was_trained_to(demo_model_fp32: Llama, wt2_8m: Path, wikitext: Path) -> None:
    ids = torch.tensor(pieces(wt2_8m, (wikitext / "test.raw.txt").read_text()[:80000]))
    windows = ids[: 64 * 256].view(64, 256)
    losses = [cross_entropy(demo_model_fp32(batch)[:, :-1].transpose(1, 2), batch[:, 1:]) for batch in windows.split(16)]
    assert 60 < math.exp(float(torch.stack(losses).mean())) < 70  # 58 on 400 windows; the first articles are harder


@pytest.mark.slow
@pytest.mark.wikitext
def test_rounding_the_logits_to_bfloat16_costs_little(
    demo_model: Llama, demo_model_fp32: Llama, wt2_8m: Path, wikitext: Path
) -> None:
    """The bounds that docs/model.md quotes; `-s` prints the figures."""
    ids = torch.tensor(pieces(wt2_8m, (wikitext / "test.raw.txt").read_text()[:40000]))
    kl, loss = torch.zeros(3), torch.zeros(2)
    batches = ids[: 24 * 256].view(24, 256).split(8)
    for batch in batches:
        h = demo_model.hidden(batch)
        rounded = demo_model.head(h).float().log_softmax(-1)
        unrounded = demo_model_fp32.lm_head(demo_model.model.norm(h).float()).log_softmax(-1)
        truth = demo_model_fp32(batch).log_softmax(-1)
        pairs = [(unrounded, rounded), (truth, rounded), (truth, unrounded)]
        kl += torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]) / len(batches)
        losses = [cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) for logits in (rounded, unrounded)]
        loss += torch.stack(losses) / len(batches)
    print(f"\nKL: head {kl[0]:.2e}, whole model {kl[1]:.2e}, all but the head {kl[2]:.2e}; ln perplexity {loss.tolist()}")
    assert kl[0] < 1e-4
    assert kl[1] < 2e-4
    assert kl[0] + kl[2] == pytest.approx(float(kl[1]), rel=0.2)  # independent roundings: their divergences add up
    assert abs(loss[0] - loss[1]) < 5e-4
