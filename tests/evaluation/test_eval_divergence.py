from __future__ import annotations

import copy

import pytest
import torch

from llmq.calibration.corpus import resolve_text, text_from_string
from llmq.errors import CheckpointError, OutputError, UsageError
from llmq.evaluation.divergence import evaluate_candidate, evaluate_divergence
from llmq.evaluation.perplexity import evaluate_perplexity, plan_evaluation
from llmq.evaluation.protocols import Windows, protocol_names, resolve_protocol
from llmq.evaluation.reference import DEFAULT_BUDGET, ReferenceLogits
from llmq.evaluation.scoring import Batching
from llmq.ops.select import prepare
from llmq.schemes.apply import quantize_

PROTOCOL = Windows(length=16)
SMALL = Batching(tokens=40, logits_bytes=128 * 4 * 7)  # slabs of 7 rows, batches of 2 windows: no boundary falls on another


def _near(model, make_model, scale: float = 0.05):
    other = make_model()
    other.output = model.output + scale * torch.randn(model.output.shape, generator=torch.Generator().manual_seed(9))
    return other


@pytest.mark.parametrize("name", sorted(protocol_names()))
def test_every_figure_is_its_definition(name: str, chars, make_model, essay) -> None:
    protocol = resolve_protocol(name, {"length": 12}, context=64)
    reference, candidate = make_model(), _near(make_model(), make_model, 0.5)
    found = evaluate_divergence(reference, candidate, chars, essay, protocol, batching=SMALL)
    kl, same, delta_p, ratio = [], [], [], []
    for window in plan_evaluation(chars, essay, protocol).windows:
        scored = window.targets.numel()
        p, q = (
            torch.log_softmax(model.head(model.hidden(window.inputs[None]))[0, -scored:].double(), -1)
            for model in (reference, candidate)
        )
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        of_target = [side.gather(1, window.targets[:, None])[:, 0] for side in (p, q)]
        delta_p.append(of_target[1].exp() - of_target[0].exp())
        ratio.append(of_target[0] - of_target[1])
    expected = torch.cat(kl)
    torch.testing.assert_close(found.kl, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(found.same_top, torch.cat(same))
    assert found.kl_mean.value == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.kl_median == pytest.approx(float(expected.quantile(0.5)), rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(expected.quantile(0.99)), rel=1e-4)
    assert found.kl_p999 == pytest.approx(float(expected.quantile(0.999)), rel=1e-4)
    assert found.kl_max == float(found.kl.max())
    share = float(torch.cat(same).double().mean())
    assert 0 < share < 1
    assert found.top1_agreement.value == pytest.approx(share)
    assert found.top1_binomial_stderr == pytest.approx((share * (1 - share) / len(expected)) ** 0.5)
    assert found.rms_delta_p.value == pytest.approx(float(torch.cat(delta_p).square().mean().sqrt()), rel=1e-4)
    assert found.delta_ln_perplexity.value == pytest.approx(float(torch.cat(ratio).mean()), abs=1e-6)
    assert not found.identical
    assert found.n_scored_tokens == len(expected)
    assert all(metric.value == metric.value for metric in found.metrics().values())
    for estimate in (found.kl_mean, found.top1_agreement, found.delta_ln_perplexity, found.rms_delta_p):
        assert estimate.stderr is not None
        assert estimate.stderr > 0


def test_a_model_does_not_diverge_from_itself(chars, make_model, essay) -> None:
    model = make_model()
    found = evaluate_divergence(model, make_model(), chars, essay, PROTOCOL)
    assert found.identical
    assert found.kl_mean.value == found.kl_max == found.rms_delta_p.value == 0
    assert found.kl_mean.stderr == found.rms_delta_p.stderr == 0
    assert found.top1_agreement.value == 1
    assert found.delta_ln_perplexity.value == found.delta_ln_perplexity.stderr == 0


def test_logits_that_differ_by_a_constant_predict_the_same(chars, make_model, essay) -> None:
    shifted = make_model()
    head = shifted.head
    shifted.head = lambda h: head(h) + 2.0
    found = evaluate_divergence(make_model(), shifted, chars, essay, PROTOCOL)
    assert not found.identical
    assert 0 <= found.kl_max < 1e-11  # fp32 would leave 1e-7
    assert found.top1_agreement.value == 1


def test_a_tiny_divergence_is_not_rounding_noise(chars, make_model, essay) -> None:
    reference = make_model()
    one, two = (evaluate_divergence(reference, _near(reference, make_model, s), chars, essay, PROTOCOL) for s in (1e-4, 2e-4))
    assert two.kl_mean.value / one.kl_mean.value == pytest.approx(4, rel=0.02)  # KL is quadratic in a small change
    assert one.kl_mean.value < 1e-7


def test_the_same_values_in_another_dtype_are_not_identical(chars, make_model, essay) -> None:
    wide = make_model()
    head = wide.head
    wide.head = lambda h: head(h).double()
    found = evaluate_divergence(make_model(), wide, chars, essay, PROTOCOL)
    assert found.kl_max == 0
    assert not found.identical


@pytest.mark.parametrize("budget", [0, DEFAULT_BUDGET], ids=["recomputed", "kept"])
def test_kept_logits_change_nothing(budget: int, chars, make_model, essay) -> None:
    reference_model, candidate = make_model(), _near(make_model(), make_model)
    with ReferenceLogits(reference_model, chars, essay, PROTOCOL, batching=SMALL, budget_bytes=budget) as reference:
        assert reference.storage.kept == (budget > 0)
        first = evaluate_candidate(candidate, chars, essay, PROTOCOL, reference=reference)
        ran = len(reference_model.batch_sizes)
        second = evaluate_candidate(candidate, chars, essay, PROTOCOL, reference=reference)
        assert (len(reference_model.batch_sizes) == ran) == (budget > 0)
        assert torch.equal(first.divergence.kl, second.divergence.kl)
        assert torch.equal(first.divergence.same_top, second.divergence.same_top)
        itself = evaluate_candidate(make_model(), chars, essay, PROTOCOL, reference=reference)
        assert itself.divergence.identical
    alone = evaluate_divergence(make_model(), candidate, chars, essay, PROTOCOL, batching=SMALL)
    assert torch.equal(alone.kl, first.divergence.kl)


def test_bf16_logits_are_kept_without_loss(chars, make_model, essay) -> None:
    def in_bf16():
        model = make_model()
        head = model.head
        model.head = lambda h: head(h).bfloat16()
        return model

    with ReferenceLogits(in_bf16(), chars, essay, PROTOCOL, batching=SMALL) as reference:
        reference.perplexity()
        assert reference.storage.nbytes == reference.plan.n_scored_tokens * 128 * 2
        assert evaluate_candidate(in_bf16(), chars, essay, PROTOCOL, reference=reference).divergence.identical


def test_one_pass_gives_the_perplexity_too(chars, make_model, essay) -> None:
    reference_model, candidate = make_model(), _near(make_model(), make_model)
    with ReferenceLogits(reference_model, chars, essay, PROTOCOL, batching=SMALL) as reference:
        before = len(candidate.batch_sizes)
        both = evaluate_candidate(candidate, chars, essay, PROTOCOL, reference=reference)
        passes = len(candidate.batch_sizes) - before
        assert passes == len(reference.batches)
        assert torch.equal(
            both.perplexity.losses.nll, evaluate_perplexity(candidate, chars, essay, PROTOCOL, batching=SMALL).losses.nll
        )
        ran = len(reference_model.batch_sizes)
        own = reference.perplexity()
        assert len(reference_model.batch_sizes) == ran  # it has run already
    assert torch.equal(own.losses.nll, evaluate_perplexity(make_model(), chars, essay, PROTOCOL, batching=SMALL).losses.nll)
    assert both.divergence.delta_ln_perplexity.value == pytest.approx(
        both.perplexity.mean_nll.value - own.mean_nll.value, abs=1e-9
    )


def test_the_model_can_go_once_its_logits_are_kept(chars, make_model, essay) -> None:
    with ReferenceLogits(make_model(), chars, essay, PROTOCOL) as reference:
        assert not reference.release_model()
        reference.perplexity()
        assert reference.release_model()
        assert evaluate_candidate(make_model(), chars, essay, PROTOCOL, reference=reference).divergence.identical
    with ReferenceLogits(make_model(), chars, essay, PROTOCOL, budget_bytes=0) as reference:
        reference.perplexity()
        assert not reference.release_model()


def test_the_temporary_file_goes(chars, make_model, essay, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ReferenceLogits(make_model(), chars, essay, PROTOCOL) as reference:
        assert not list(tmp_path.iterdir())  # nothing ran yet
        reference.perplexity()
        (folder,) = tmp_path.iterdir()
        assert (folder / "logits").stat().st_size == reference.storage.nbytes
    assert not list(tmp_path.iterdir())


def test_a_pass_that_breaks_off_leaves_no_wrong_logits(chars, make_model, essay) -> None:
    with ReferenceLogits(make_model(), chars, essay, PROTOCOL, batching=SMALL) as reference:
        broken = make_model()
        broken.head = lambda h: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate_candidate(broken, chars, essay, PROTOCOL, reference=reference)
        assert evaluate_candidate(make_model(), chars, essay, PROTOCOL, reference=reference).divergence.identical
        assert evaluate_candidate(make_model(), chars, essay, PROTOCOL, reference=reference).divergence.identical


def test_storage_says_why(chars, make_model, essay, monkeypatch) -> None:
    def storage(budget: int = DEFAULT_BUDGET):
        return ReferenceLogits(make_model(), chars, essay, PROTOCOL, budget_bytes=budget).storage

    assert "kept without loss in a temporary file" in storage().reason
    assert storage().kept
    small = storage(1000)
    assert not small.kept
    assert "runs again beside every candidate" in small.reason
    assert "more than the 1,000 that may be kept" in small.reason
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 5})())
    full = storage()
    assert not full.kept
    assert "has 5 free" in full.reason


def test_the_user_is_told_which_it_is(chars, make_model, essay) -> None:
    from llmq.progress import Silent

    class Listener(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    listener = Listener()
    with ReferenceLogits(make_model(), chars, essay, PROTOCOL) as reference:
        for _ in range(2):
            evaluate_candidate(make_model(), chars, essay, PROTOCOL, reference=reference, progress=listener)
    assert listener.notes == [reference.storage.reason]


def test_a_disk_that_fills_up_says_so(chars, make_model, essay, monkeypatch) -> None:
    import pathlib

    def full(self, mode="r", *rest, **named):
        raise OSError(28, "No space left on device")

    with ReferenceLogits(make_model(), chars, essay, PROTOCOL) as reference:
        monkeypatch.setattr(pathlib.Path, "open", full)
        with pytest.raises(OutputError, match=r"cannot write the reference's logits .*No space left on device.*TMPDIR"):
            reference.perplexity()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tokenizer", "its tokenizer"),
        ("text", "its text"),
        ("protocol", "its protocol"),
        ("vocabulary", "vocabulary has 130 entries"),
    ],
)
def test_a_candidate_that_is_not_alike_is_refused(what: str, message: str, chars, make_chars, make_model, essay) -> None:
    with ReferenceLogits(make_model(), chars, essay, PROTOCOL) as reference:
        candidate = make_model(vocab_size=130 if what == "vocabulary" else 128)
        tokenizer = make_chars(sha256="d" * 64) if what == "tokenizer" else chars
        text = text_from_string("another text, " * 20, name="other", origin="test") if what == "text" else essay
        protocol = Windows(length=16, limit=2) if what == "protocol" else PROTOCOL
        with pytest.raises(UsageError, match=message):
            evaluate_candidate(candidate, tokenizer, text, protocol, reference=reference)


def test_an_infinite_logit_is_named(chars, make_model, essay) -> None:
    candidate = make_model()
    head = candidate.head
    candidate.head = lambda h: head(h).index_fill(-1, torch.tensor([0]), -torch.inf)  # a token that the text does not have
    with pytest.raises(CheckpointError, match=r"divergence of \d+ of \d+ positions is not finite"):
        evaluate_divergence(make_model(), candidate, chars, essay, PROTOCOL)


@pytest.mark.slow
@pytest.mark.wikitext
def test_fewer_bits_diverge_more(demo, wikitext) -> None:
    original, tokenizer = demo
    text, protocol = resolve_text(wikitext, split="test"), Windows(length=256, limit=4)
    found = {}
    with ReferenceLogits(original, tokenizer, text, protocol) as reference:
        for scheme, options in (("fp32", {}), ("bf16", {}), ("int8-weight-only", {}), ("int4", {"group_size": 128})):
            candidate = copy.deepcopy(original)
            baseline = scheme in ("fp32", "bf16")
            quantize_(candidate, scheme, options=options, dtype=torch.float32, skip=() if baseline else ("lm_head",))
            prepare(candidate)
            found[scheme] = evaluate_candidate(candidate, tokenizer, text, protocol, reference=reference).divergence
    kl = {scheme: one.kl_mean.value for scheme, one in found.items()}
    assert found["fp32"].kl_max < 1e-6  # the same arithmetic, at most in another kernel
    assert 0 < kl["bf16"] < 1e-3
    assert 0 < kl["int8-weight-only"] < kl["int4"] / 20  # four bits fewer: 16 times the step, 256 times its square
    assert found["int8-weight-only"].top1_agreement.value > found["int4"].top1_agreement.value
