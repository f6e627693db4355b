from __future__ import annotations

import pytest
import torch

from llmq.errors import UsageError
from llmq.evaluation.scoring import Batching
from llmq.model.generate import generate
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama

pytest.importorskip("lm_eval")


@pytest.fixture
def lm(llama: Llama, chars):
    from llmq.evaluation.lm_adapter import LlmqLM

    return LlmqLM(llama, chars, batching=Batching(tokens=100))


def _requests(*args: tuple[object, ...], kind: str = "loglikelihood"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(args)]


def test_continuations_are_scored_after_bos_and_context(lm, llama, chars, exact_score) -> None:
    pairs = [
        ("The sea is", " blue"),
        ("The sea is", " deep"),
        ("", "Salt"),
        ("A", "b"),
        ("The sea is ", "wide"),
        ("Q:", " y"),
        ("Q:", " n"),
    ]
    found = lm.loglikelihood(_requests(*pairs))
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        tokens = chars.encode(context + continuation, bos=True)
        n = len(continuation) + (len(context) - len(context.rstrip()))  # a blank at the end of a context belongs to the answer
        expected, best = exact_score(llama, tokens[:-1], tokens[-n:])
        assert score == pytest.approx(expected, rel=1e-5)
        assert greedy == best


def test_the_greedy_continuation_is_called_greedy(lm, llama, chars, exact_score) -> None:
    best = next(generate(llama, chars.encode("Ink", bos=True), max_new_tokens=1, stop=()))
    ((score, greedy),) = lm._loglikelihood_tokens([(("Ink", "?"), chars.encode("Ink", bos=True), [best])])
    assert greedy
    assert score == pytest.approx(exact_score(llama, chars.encode("Ink", bos=True), [best])[0], rel=1e-5)


def test_answers_to_one_question_share_a_forward_pass(lm, llama, monkeypatch) -> None:
    sequences: list[int] = []
    hidden = Llama.hidden
    monkeypatch.setattr(
        Llama, "hidden", lambda self, tokens, *rest: (sequences.append(tokens.shape[0]), hidden(self, tokens, *rest))[1]
    )
    scores = lm.loglikelihood(_requests(*[("Which?", letter) for letter in "ABCD"], ("Which!", "A")))
    assert sum(sequences) == 2
    assert len({score for score, _ in scores}) == 5


def test_a_long_request_loses_its_left(lm, llama, chars, exact_score) -> None:
    context, continuation = "x" * 30 + "y" * 40, "zz"
    ((score, _),) = lm.loglikelihood(_requests((context, continuation)))
    tokens = chars.encode(context + continuation)
    assert score == pytest.approx(exact_score(llama, tokens[-49:-1], tokens[-2:])[0], rel=1e-5)
    with pytest.raises(UsageError, match=r"continuation of 49 tokens, but the model reads at most 48"):
        lm.loglikelihood(_requests(("a", "b" * 49)))
    with pytest.raises(UsageError, match=r"continuation '' , which has no tokens|continuation '', which has no tokens"):
        lm.loglikelihood(_requests(("a", "")))


def test_documents_are_scored_whole(lm, llama, chars, exact_score) -> None:
    short, long = "Salt.", "The tide is a rise and fall of the sea. " * 3
    found = lm.loglikelihood_rolling(_requests((short,), (long,), ("",), kind="loglikelihood_rolling"))
    tokens = chars.encode(short)
    assert found[0] == pytest.approx(exact_score(llama, [126, *tokens[:-1]], tokens)[0], rel=1e-5)
    tokens = [126, *chars.encode(long)]  # 120 characters: two windows of 48, and one that scores the last 24
    expected = (
        exact_score(llama, tokens[:48], tokens[1:49])[0]
        + exact_score(llama, tokens[48:96], tokens[49:97])[0]
        + exact_score(llama, tokens[72:120], tokens[97:])[0]
    )
    assert found[1] == pytest.approx(expected, rel=1e-5)
    assert found[2] == 0


def test_requests_are_scored_and_continued_through_the_cache(lm, llama, chars) -> None:
    from llmq.evaluation.lm_adapter import LlmqLM

    quantized = LlmqLM(llama, chars, kv_dtype=torch.int8, batching=Batching(tokens=100))
    requests = _requests(("The sea is", " blue"), ("", "Salt"))
    found = [score for score, _ in quantized.loglikelihood(requests)]
    for (context, continuation), score in zip((("The sea is", " blue"), ("", "Salt")), found, strict=True):
        tokens = torch.tensor([chars.encode(context + continuation, bos=True)])
        cache = KVCache(llama.config, 1, tokens.shape[1] - 1, torch.int8, "cpu")
        logits = llama(tokens[:, :-1], cache)[0, -len(continuation) :].double().log_softmax(-1)
        assert score == pytest.approx(float(logits.gather(1, tokens[0, -len(continuation) :, None]).sum()), rel=1e-5)
    plain = [score for score, _ in lm.loglikelihood(requests)]
    assert all(0 < abs(a - b) < 0.05 * abs(b) for a, b in zip(found, plain, strict=True))
    (text,) = quantized.generate_until(_requests(("Once", {"max_gen_toks": 12}), kind="generate_until"))
    own = generate(llama, chars.encode("Once", bos=True), max_new_tokens=12, kv_dtype=torch.int8)
    assert text == chars.decode(list(own))


def _greedy_text(llama: Llama, chars, prompt: list[int], n: int) -> str:
    return chars.decode(list(generate(llama, prompt, max_new_tokens=n)))


def test_generation_goes_on_until_it_is_stopped(lm, llama, chars) -> None:
    text = _greedy_text(llama, chars, chars.encode("Once", bos=True), 20)
    assert len(text) > 8
    stop = text[5:7]
    whole, cut, few = lm.generate_until(
        _requests(
            ("Once", {"until": [], "max_gen_toks": 20}),
            ("Once", {"until": [stop, "\0\0"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
            ("Once", {"until": "\0\0", "max_new_tokens": 3}),
            kind="generate_until",
        )
    )
    assert whole == text
    assert cut == text[: text.index(stop)]
    assert few == text[:3]


def test_a_long_prompt_loses_its_left(lm, llama, chars) -> None:
    (found,) = lm.generate_until(_requests(("p" * 100 + "Once", {"max_gen_toks": 8}), kind="generate_until"))
    assert found == _greedy_text(llama, chars, chars.encode("p" * 36 + "Once"), 8)


def test_sampling_follows_the_seed(llama, chars) -> None:
    from llmq.evaluation.lm_adapter import LlmqLM

    def sampled(seed: int) -> list[str]:
        lm = LlmqLM(llama, chars, seed=seed)
        options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 50}
        return lm.generate_until(_requests(("Once", options), ("Once", options), kind="generate_until"))

    first = sampled(3)
    assert first == sampled(3)
    assert first != sampled(4)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 48}, r"asks to generate 48 tokens, but the model's context of 48"),
        ({"num_beams": 4}, r"option 'num_beams', which llmq does not have; it has until, max_gen_toks"),
        ({"temperature": -1.0, "do_sample": True}, r"temperature must be 0"),
    ],
)
def test_generation_options_that_cannot_be(options: dict[str, object], message: str, lm) -> None:
    with pytest.raises(UsageError, match=message):
        lm.generate_until(_requests(("Once", options), kind="generate_until"))


def test_an_undemanding_task_gets_half_of_a_short_context(lm) -> None:
    assert lm._generation({}, 0).max_new_tokens == 24


def test_max_length_has_to_fit(llama, chars) -> None:
    from llmq.evaluation.lm_adapter import LlmqLM

    assert LlmqLM(llama, chars, max_length=16).max_length == 16
    with pytest.raises(UsageError, match="from 2 to the model's context of 48, got 49"):
        LlmqLM(llama, chars, max_length=49)


def test_a_tokenizer_without_bos(llama, make_chars, exact_score) -> None:
    from llmq.evaluation.lm_adapter import LlmqLM

    lm = LlmqLM(llama, make_chars(bos_id=None))
    assert lm.prefix_token_id == lm.eot_token_id == 127
    assert lm.tok_encode("ab") == [97, 98]
    ((score, _),) = lm.loglikelihood(_requests(("", "ab")))
    assert score == pytest.approx(exact_score(llama, [127, 97], [97, 98])[0], rel=1e-5)
