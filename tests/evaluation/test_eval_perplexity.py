from __future__ import annotations

import math
from math import exp, log

import pytest
import torch

from llmq.calibration.corpus import resolve_text
from llmq.errors import CheckpointError, TokenizerError, UsageError
from llmq.evaluation.perplexity import evaluate_perplexity, plan_evaluation
from llmq.evaluation.protocols import LlamaCpp, LmEvalWord, Windows, protocol_names, resolve_protocol
from llmq.evaluation.scoring import Batching

NAMES = sorted(protocol_names())


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_what_the_model_says(name: str, chars, mean_model, essay, exact_nll) -> None:
    protocol = resolve_protocol(name, {"length": 12, "limit": 2}, context=64)
    result = evaluate_perplexity(mean_model, chars, essay, protocol)
    expected = []
    for window in plan_evaluation(chars, essay, protocol).windows:
        inputs = window.inputs.tolist()
        first = len(inputs) - window.targets.numel()
        expected += [exact_nll(mean_model, inputs[: first + i + 1], target) for i, target in enumerate(window.targets.tolist())]
    assert result.losses.nll.dtype == torch.float32
    torch.testing.assert_close(result.losses.nll.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert result.mean_nll.value == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert result.perplexity.value == pytest.approx(exp(result.mean_nll.value), rel=1e-12)
    assert result.perplexity.stderr == pytest.approx(result.perplexity.value * result.mean_nll.stderr)
    assert result.n_scored_tokens == len(expected)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(chars, mean_model, essay) -> None:
    mean_model.output.zero_()
    result = evaluate_perplexity(mean_model, chars, essay, Windows(length=16))
    assert result.perplexity.value == pytest.approx(128, rel=1e-6)
    assert result.perplexity.stderr == pytest.approx(0, abs=1e-5)


def test_words_and_bytes_are_those_of_the_original(chars, mean_model, essay) -> None:
    result = evaluate_perplexity(mean_model, chars, essay, LmEvalWord(length=16))
    total = result.losses.total()
    words = sum(len(page.split()) + 1 + (page[0].isspace() and page[-1].isspace()) for page in essay.documents())
    size = sum(len(page.encode()) for page in essay.documents())
    assert result.original is not None
    assert (result.original.n_words, result.original.n_bytes) == (words, size)
    assert result.original.word_perplexity.value == pytest.approx(exp(total / words), rel=1e-9)
    assert result.original.byte_perplexity.value == pytest.approx(exp(total / size), rel=1e-9)
    assert result.original.bits_per_byte.value == pytest.approx(total / size / log(2), rel=1e-9)
    assert result.original.word_perplexity.stderr > 0
    assert set(result.metrics()) == {"perplexity", "nll", "word_perplexity", "byte_perplexity", "bits_per_byte"}


def test_a_figure_that_overflows_is_left_out_of_records(chars, mean_model, essay) -> None:
    mean_model.output *= 300
    result = evaluate_perplexity(mean_model, chars, essay, LmEvalWord(length=16))
    assert result.original is not None
    assert result.original.word_perplexity.value == math.inf
    assert "word_perplexity" not in result.metrics()
    assert result.metrics()["bits_per_byte"].value > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "batching", [Batching(1, 1), Batching(40, 128 * 4 * 3), Batching(10**6, 10**9)], ids=["one", "some", "all"]
)
def test_batching_changes_nothing_but_rounding(name: str, batching: Batching, chars, make_model, essay) -> None:
    protocol = resolve_protocol(name, {"length": 12}, context=64)
    usual = evaluate_perplexity(make_model(), chars, essay, protocol)
    model = make_model()
    other = evaluate_perplexity(model, chars, essay, protocol, batching=batching)
    torch.testing.assert_close(other.losses.nll, usual.losses.nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(other.losses.window_sizes, usual.losses.window_sizes)
    assert max(model.head_rows) * 128 * 4 <= max(batching.logits_bytes, 128 * 4)
    longest = max(window.inputs.numel() for window in plan_evaluation(chars, essay, protocol).windows)
    assert max(model.batch_sizes) <= max(1, batching.tokens // longest)
    assert (max(model.batch_sizes) > 1) == (batching.tokens >= 2 * longest)


def test_a_large_vocabulary_is_scored_in_pieces_and_only_where_asked(chars, make_model, essay) -> None:
    model = make_model(vocab_size=128_256)
    result = evaluate_perplexity(
        model, chars, essay, LlamaCpp(length=32, limit=2), batching=Batching(logits_bytes=128_256 * 4 * 4)
    )
    assert max(model.head_rows) == 4
    assert sum(model.head_rows) == result.n_scored_tokens == 2 * 15
    assert math.isfinite(result.perplexity.value)


def test_low_precision_logits_are_softmaxed_in_fp32(chars, mean_model, essay) -> None:
    head = mean_model.head
    mean_model.head = lambda h: head(h).bfloat16()
    result = evaluate_perplexity(mean_model, chars, essay, Windows(length=16, limit=1))
    assert result.losses.dtype == "bfloat16"
    plan = plan_evaluation(chars, essay, Windows(length=16, limit=1))
    logits = mean_model.head(mean_model.hidden(plan.windows[0].inputs[None]))[0].double()
    exact = torch.nn.functional.cross_entropy(logits, plan.windows[0].targets, reduction="none")
    torch.testing.assert_close(result.losses.nll.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_record_says_all_that_must_agree(chars, mean_model, essay) -> None:
    result = evaluate_perplexity(mean_model, chars, essay, Windows(length=16, limit=3))
    protocol = result.protocol()
    assert (protocol.name, protocol.version) == ("windows", 1)
    assert protocol.params == {
        "length": 16,
        "limit": 3,
        "bos": "one, at the start of the text",
        "text": "essay",
        "text_sha256": essay.sha256,
        "n_windows": 3,
        "n_scored_tokens": 45,
    }
    assert result.losses.tokenizer_sha256 == chars.sha256
    assert result.losses.window_ids.tolist() == [0] * 15 + [1] * 15 + [2] * 15


def test_progress_is_told_of_every_window(chars, mean_model, essay) -> None:
    from contextlib import contextmanager

    class Listener:
        steps = 0
        total = 0

        @contextmanager
        def task(self, description: str, total: int):
            self.total = total

            def advance(steps: int) -> None:
                self.steps += steps

            yield advance

        def note(self, message: str) -> None:
            raise AssertionError(message)

    listener = Listener()
    result = evaluate_perplexity(mean_model, chars, essay, Windows(length=16), progress=listener)
    assert listener.steps == listener.total == result.n_windows


def test_a_model_that_overflows_is_named(chars, mean_model, essay) -> None:
    mean_model.output[5] = torch.nan
    with pytest.raises(CheckpointError, match=r"gives 15 of 15 tokens a loss that is not finite"):
        evaluate_perplexity(mean_model, chars, essay, Windows(length=16, limit=1))


def test_a_strange_tokenizer_is_named(chars, make_model, essay) -> None:
    with pytest.raises(TokenizerError, match=r"gives token 126, but the model's vocabulary has 100 entries"):
        evaluate_perplexity(make_model(vocab_size=100), chars, essay, Windows(length=16))


def test_windows_beyond_the_context_are_refused(chars, make_model, essay) -> None:
    with pytest.raises(UsageError, match=r"windows of 16 tokens, but the model reads at most 8"):
        evaluate_perplexity(make_model(context=8), chars, essay, Windows(length=16))


@pytest.mark.slow
@pytest.mark.wikitext
def test_windows_agree_with_transformers(demo, wikitext, wt2_8m) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = demo
    text = resolve_text(wikitext, split="test")
    result = evaluate_perplexity(model, tokenizer, text, Windows(length=256, limit=6))

    theirs = transformers.LlamaForCausalLM.from_pretrained(wt2_8m, dtype=torch.float32)
    rows = (wikitext / "test.raw.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    stream = torch.tensor([[1, *tokenizer.encode("\n\n".join(row + "\n" if row.strip() else "" for row in rows))]])
    nlls = []
    for i in range(6):
        batch = stream[:, i * 256 : (i + 1) * 256]
        with torch.no_grad():
            logits = theirs(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:])
        nlls.append(loss * 256)
    expected = torch.exp(torch.stack(nlls).sum() / (6 * 256))
    assert result.perplexity.value == pytest.approx(float(expected), rel=2e-6)
