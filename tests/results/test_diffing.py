"""Two runs against each other: what pairs, what each verdict rests on, what is refused and why."""

from __future__ import annotations

import numpy as np
import pytest
from gate_runs import INT4, SIZE, WINDOWS, decode, quality, run, tokens
from scipy import stats

from llmq.api.diffing import diff_runs
from llmq.results.diff import Diff, diff_markdown
from llmq.results.record import ResultRecord
from llmq.results.tolerances import Tolerances, read_tolerances
from llmq.results.verdict import Finding, Verdict

LIMITS = read_tolerances()


def diff(before: list[ResultRecord], after: list[ResultRecord], limits: Tolerances = LIMITS) -> Diff:
    return diff_runs(run("before", *before), run("after", *after), limits)


def finding(found: Diff, metric: str) -> Finding:
    (only,) = [each for each in found.findings if each.metric == metric]
    return only


def test_unchanged_runs_are_identical_and_fine() -> None:
    found = diff([*quality(tokens()), decode()], [*quality(tokens()), decode()])
    assert found.exit_code == 0
    assert {finding(found, name).verdict for name in ("ln perplexity", "KL", "same top-1", "size", "kernels")} == {"identical"}
    assert finding(found, "decode tokens/s").verdict == Verdict.OK


def test_a_paired_change_has_students_interval_over_windows() -> None:
    before, after = tokens(), tokens(worse=0.01, jitter=0)
    found = finding(diff(quality(before), quality(after)), "ln perplexity")
    # windows of one size: the mean of window means, and its ordinary standard error
    means = (after.nll.astype(float) - before.nll).reshape(WINDOWS, SIZE).mean(1)
    half = stats.t.ppf(0.995, WINDOWS - 1) * means.std(ddof=1) / WINDOWS**0.5
    assert found.change == pytest.approx(means.mean())
    assert (found.low, found.high) == (pytest.approx(means.mean() - half), pytest.approx(means.mean() + half))
    assert (found.method, found.verdict, found.outcome) == ("paired", Verdict.REGRESSION, "fail")


def test_pairing_sees_what_errors_of_means_hide() -> None:
    before, after = tokens(), tokens(worse=0.01, jitter=0)
    unpaired = finding(diff(quality(before, keep=False), quality(after)), "ln perplexity")
    assert (unpaired.method, unpaired.verdict) == ("unpaired", Verdict.OK)
    assert "unpaired: the baseline has no figures of single tokens" in unpaired.reason
    much = finding(diff(quality(before), quality(tokens(worse=0.5), keep=False)), "ln perplexity")
    assert (much.method, much.verdict) == ("unpaired", Verdict.REGRESSION)


def test_noise_is_no_change_and_a_small_one_is_tolerated() -> None:
    noisy = diff(quality(tokens(jitter=0)), quality(tokens(jitter=1)))
    assert finding(noisy, "ln perplexity").verdict == Verdict.OK
    small = finding(diff(quality(tokens(jitter=0)), quality(tokens(worse=0.0019, jitter=0))), "ln perplexity")
    assert (small.verdict, small.outcome) == (Verdict.WORSE, "warn")


def test_divergence_is_judged_by_mean_and_by_agreement() -> None:
    wider = finding(diff(quality(tokens()), quality(tokens(kl=0.03))), "KL")
    assert wider.verdict == Verdict.REGRESSION
    assert wider.tolerance == pytest.approx(0.1 * tokens().kl.astype(float).mean())  # type: ignore[union-attr]
    fewer = finding(diff(quality(tokens(agreement=0.95)), quality(tokens(agreement=0.85))), "same top-1")
    assert (fewer.verdict, fewer.unit) == (Verdict.REGRESSION, "%")
    assert fewer.change == pytest.approx(-10, abs=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_sha256": "e" * 64, "n_windows": 21}, "text_sha256 is 'ffff"),
        ({"length": 99}, "length is 51 in the baseline and 99 in the candidate"),
    ],
)
def test_another_protocol_or_text_is_refused_with_both_values(change: dict[str, object], says: str) -> None:
    found = diff(quality(tokens()), quality(tokens(worse=1), **change))
    assert found.exit_code == 2
    assert {each.verdict for each in found.findings} == {Verdict.NOT_COMPARABLE}
    assert all(says in each.reason for each in found.findings)


def test_another_tokenizer_is_refused_even_where_the_divergence_could_not_be_measured() -> None:
    other = INT4.model_copy(update={"tokenizer_sha256": "c" * 64})
    found = diff(quality(tokens()), quality(tokens(worse=1), subject=other)[:1])
    assert found.exit_code == 2
    assert [each.verdict for each in found.findings] == [Verdict.NOT_COMPARABLE] * 2
    assert all("tokenizer_sha256 is 'bbb" in each.reason and "'ccc" in each.reason for each in found.findings)


def test_a_text_is_known_by_its_content_and_a_checkpoint_may_change() -> None:
    damaged = INT4.model_copy(update={"checkpoint_sha256": "d" * 64})
    found = diff(quality(tokens()), quality(tokens(), subject=damaged, text="another name"))
    assert found.exit_code == 0
    assert any("checkpoint_sha256 is 'aaaa" in note and "'dddd" in note for note in found.notes)


def test_what_has_no_partner_is_missing_or_new() -> None:
    found = diff([*quality(tokens()), decode()], quality(tokens()))
    assert (found.exit_code, finding(found, "decode").verdict) == (1, Verdict.MISSING)
    allowed = LIMITS.model_copy(update={"missing": "allow"})
    assert diff([*quality(tokens()), decode()], quality(tokens()), allowed).exit_code == 0
    added = diff(quality(tokens()), [*quality(tokens()), decode()])
    assert (added.exit_code, finding(added, "decode").verdict) == (0, Verdict.NEW)
    renamed = INT4.model_copy(update={"model": "other"})
    lost = diff(quality(tokens()), quality(tokens(), subject=renamed))
    assert lost.exit_code == 1
    assert any("no model 'tiny'; it has 'other'" in each.reason for each in lost.findings)


def test_the_newest_of_several_records_counts() -> None:
    found = diff(quality(tokens()), [*quality(tokens(worse=1)), *quality(tokens())])
    assert found.exit_code == 0
    assert found.notes == ["2 older records of the same measurement in the candidate were left out"]


def test_speed_of_another_machine_is_no_failure() -> None:
    found = diff([*quality(tokens()), decode()], [*quality(tokens()), decode(10, threads=1)])
    assert found.exit_code == 0
    slow = finding(found, "decode tokens/s")
    assert (slow.verdict, slow.outcome) == (Verdict.OTHER_MACHINE, "note")
    assert "threads is 2 in the baseline and 1 in the candidate" in slow.reason
    assert finding(found, "ln perplexity").verdict == Verdict.IDENTICAL


def test_a_slower_kernel_fails_and_its_ratio_is_preferred() -> None:
    assert finding(diff([decode()], [decode(90, seed=1)]), "decode tokens/s").verdict == Verdict.REGRESSION
    found = finding(diff([decode(against=True)], [decode(80, seed=1, against=True)]), "decode speed / bf16")
    assert (found.verdict, found.unit) == (Verdict.REGRESSION, "x")
    assert found.baseline == pytest.approx(2, rel=0.02)
    assert found.noise_floor is not None
    assert 0 < found.noise_floor < 5


def test_a_noisy_measurement_cannot_fail() -> None:
    found = finding(diff([decode(against=True)], [decode(88, spread=0.3, seed=1, against=True)]), "decode speed / bf16")
    assert found.outcome != "fail"


def test_one_repeat_is_not_comparable() -> None:
    once = decode()
    metric = once.metrics["tokens_per_s"].model_copy(update={"samples": [100.0]})
    found = finding(diff([decode()], [once.model_copy(update={"metrics": {"tokens_per_s": metric}})]), "decode tokens/s")
    assert found.verdict == Verdict.NOT_COMPARABLE


def test_a_different_kernel_is_its_own_verdict() -> None:
    found = finding(diff([decode()], [decode(kernel="dequant-gemm")]), "kernels")
    assert (found.verdict, found.outcome) == (Verdict.DIFFERENT_KERNEL, "fail")
    assert "dequant-gemm (56), and native-int4 (56) in the baseline" in found.reason
    mild = LIMITS.model_copy(update={"speed": LIMITS.speed.model_copy(update={"different_kernel": "warn"})})
    assert diff([decode()], [decode(kernel="dequant-gemm")], mild).exit_code == 0
    elsewhere = finding(diff([decode()], [decode(kernel="dequant-gemm", cpu_features=[])]), "kernels")
    assert elsewhere.verdict == Verdict.OTHER_MACHINE


def test_a_larger_file_fails() -> None:
    larger = INT4.model_copy(update={"size_bytes": INT4.size_bytes + 1, "bits_per_weight": 4.25})  # type: ignore[operator]
    found = diff(quality(tokens()), quality(tokens(), subject=larger))
    assert finding(found, "size").verdict == Verdict.REGRESSION
    assert finding(found, "bits/weight").verdict == Verdict.BETTER


def test_nothing_in_common_is_not_comparable() -> None:
    assert diff([], []).exit_code == 2


def test_windows_of_other_sizes_are_refused() -> None:
    other = tokens()
    sizes = np.array([SIZE - 1, SIZE + 1] * (WINDOWS // 2), np.int32)
    cut = type(other)(other.nll, sizes, other.kl, other.same_top)
    found = finding(diff(quality(tokens()), quality(cut)), "ln perplexity")
    assert found.verdict == Verdict.NOT_COMPARABLE


def test_markdown_begins_with_the_result_and_folds_the_rest() -> None:
    text = diff_markdown(diff([*quality(tokens()), decode()], [*quality(tokens(worse=0.5)), decode(kernel="a|b")]))
    assert text.startswith("### ❌ llmq: regression: 2 failed")
    assert text.index("| regression") < text.index("<details>")
    assert "a\\|b" in text
    assert "Fast 9000" in text


def test_measurements_that_differ_in_a_parameter_alone_keep_their_names_apart() -> None:
    def several(rate: float) -> list[ResultRecord]:
        batched = decode(rate, seed=3)
        params = batched.protocol.params | {"batch_size": 4}
        return [decode(), batched.model_copy(update={"protocol": batched.protocol.model_copy(update={"params": params})})]

    found = diff(several(100), several(50))
    assert finding(found, "decode tokens/s (batch_size=1)").verdict == Verdict.OK
    assert finding(found, "decode tokens/s (batch_size=4)").verdict == Verdict.REGRESSION
