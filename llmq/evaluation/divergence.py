"""How far a candidate's predictions are from a reference's: more sensitive than perplexity, and blind to lucky errors.

For every scored position, with p the reference's distribution, q the candidate's, t the true token:

    KL(p ‖ q) = Σ_v p(v) ln(p(v) / q(v))    nats; in double precision, since for near-identical models fp32 would give noise
    top-1 agreement: both find the same token most likely
    Δp = q(t) - p(t), reported as its root mean square
    Δ ln ppl = mean of nll_q(t) - nll_p(t), paired: what both find hard cancels

These are the statistics of llama.cpp's `perplexity --kl-divergence`; standard errors are by batch means over windows (see
`estimates`), because neighbouring tokens are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.calibration.corpus import TextSource
from llmq.errors import CheckpointError, UsageError
from llmq.evaluation.estimates import Estimate, batch_means
from llmq.evaluation.perplexity import PerplexityResult, check_plan, dtype_name, summarize
from llmq.evaluation.protocols import PerplexityProtocol
from llmq.evaluation.reference import ReferenceLogits
from llmq.evaluation.scoring import Batching, LanguageModel, Slab, row_chunks, slabs, token_losses
from llmq.evaluation.shared import SharedBatches
from llmq.model.tokenizer import Tokenizer
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks
from llmq.results import record
from llmq.results.record import Metric


@dataclass(frozen=True, eq=False)
class DivergenceResult:
    """How far a candidate is from the reference, with every token's figures."""

    kl: Tensor
    """float64 [n]: KL(reference ‖ candidate) of every scored position, nats."""
    same_top: Tensor
    """bool [n]: both find the same token most likely."""
    delta_p: Tensor
    """float64 [n]: how much more probable the candidate finds the true token."""
    window_sizes: Tensor
    """int32 [W]: scored tokens of each window, consecutive in the arrays above."""
    protocol: record.Protocol
    """With the text and its hash, as for a perplexity."""
    kl_mean: Estimate
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: Estimate
    """Share of positions, 0 to 1; standard error by batch means over windows."""
    top1_binomial_stderr: float
    """The standard error that other tools print: as if tokens were independent."""
    delta_ln_perplexity: Estimate
    """ln(ppl of the candidate / ppl of the reference), paired."""
    rms_delta_p: Estimate
    identical: bool
    """Every logit of every scored position is bit for bit the reference's."""

    @property
    def n_scored_tokens(self) -> int:
        """Positions compared."""
        return self.kl.numel()

    def metrics(self) -> dict[str, Metric]:
        """The figures for a result record."""
        return {
            "kl_mean": Metric(value=self.kl_mean.value, unit="nats/token", stderr=self.kl_mean.stderr),
            "kl_median": Metric(value=self.kl_median, unit="nats/token"),
            "kl_p99": Metric(value=self.kl_p99, unit="nats/token"),
            "kl_p999": Metric(value=self.kl_p999, unit="nats/token"),
            "kl_max": Metric(value=self.kl_max, unit="nats/token"),
            "top1_agreement": Metric(value=self.top1_agreement.value, unit="1", stderr=self.top1_agreement.stderr),
            "delta_ln_perplexity": Metric(
                value=self.delta_ln_perplexity.value, unit="nats/token", stderr=self.delta_ln_perplexity.stderr
            ),
            "rms_delta_p": Metric(value=self.rms_delta_p.value, unit="1", stderr=self.rms_delta_p.stderr),
        }


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """Both answers of one pass over the text."""

    perplexity: PerplexityResult
    divergence: DivergenceResult


def evaluate_candidate(
    candidate: LanguageModel,
    tokenizer: Tokenizer,
    text: TextSource,
    protocol: PerplexityProtocol,
    *,
    reference: ReferenceLogits,
    ranks: Ranks | None = None,
    progress: Progress = SILENT,
) -> CandidateResult:
    """Measure perplexity and divergence of `candidate` from the same forward passes.

    Args:
        candidate: the model in question; may be the reference itself, which diverges by exactly 0.
        tokenizer: the candidate's; has to be the reference's, as text and protocol.
        text: what is scored.
        protocol: how.
        reference: the other side.
        ranks: the processes that share the windows; all get the result, which is that of one process, bit for bit.
        progress: is told of every window of this process, and of whether the reference's logits are kept.

    Raises:
        UsageError: tokenizer, text or protocol are not the reference's, or the models' vocabularies differ.
        CheckpointError: a loss or divergence is not finite.
    """
    reference.check(tokenizer, text, protocol)
    plan = reference.plan
    check_plan(plan, candidate)
    vocabulary, expected = candidate.config.vocab_size, reference.vocabulary
    if vocabulary != expected:
        raise UsageError(
            f"the candidate's vocabulary has {vocabulary} entries, the reference's {expected}; "
            "divergence needs the same one in both."
        )
    if not reference.complete:
        progress.note(reference.storage.reason)
    ranks = ranks or Ranks()
    shared = SharedBatches(reference.batches, ranks)
    sides: list[_Sides] = []
    losses: list[Tensor] = []
    dtypes = ("", "")
    task = progress.task(f"perplexity and divergence ({plan.protocol.name})", shared.windows)
    with ranks.together(), task as advance, torch.no_grad():
        for index in shared.indices:
            batch = reference.batches[index]
            for theirs, mine in zip(reference.slabs(index), slabs(candidate, batch, reference.batching), strict=True):
                losses.append(token_losses(mine))
                sides.append(_compare(theirs, mine))
                dtypes = dtype_name(theirs.logits.dtype), dtype_name(mine.logits.dtype)
            advance(len(batch))
    other = shared.joined([reference.losses(index) for index in shared.indices], torch.float32)
    joined = _Sides(
        kl=shared.joined([side.kl for side in sides], torch.float64),
        same_top=shared.joined([side.same_top for side in sides], torch.bool),
        identical=shared.all(mine=all(side.identical for side in sides)),
    )
    perplexity = summarize(plan, shared.joined(losses, torch.float32), shared.word(dtypes[1]))
    return CandidateResult(perplexity, _summarize(perplexity, summarize(plan, other, shared.word(dtypes[0])), joined))


def evaluate_divergence(
    reference: LanguageModel,
    candidate: LanguageModel,
    tokenizer: Tokenizer,
    text: TextSource,
    protocol: PerplexityProtocol,
    *,
    batching: Batching | None = None,
    progress: Progress = SILENT,
) -> DivergenceResult:
    """Measure only how far one `candidate` is from `reference`: both run side by side, window by window, and nothing is kept.

    Raises:
        UsageError: the models' vocabularies differ, or the windows are longer than a model's context.
        CheckpointError: a loss or divergence is not finite.
    """
    with ReferenceLogits(reference, tokenizer, text, protocol, batching=batching, budget_bytes=0) as other:
        return evaluate_candidate(candidate, tokenizer, text, protocol, reference=other, progress=progress).divergence


@dataclass(frozen=True, slots=True)
class _Sides:
    kl: Tensor
    same_top: Tensor
    identical: bool


def _compare(reference: Slab, candidate: Slab) -> _Sides:
    """Compare the logits of some positions, all [R, V]."""
    rows, vocabulary = reference.logits.shape
    kl: list[Tensor] = []
    same_top: list[Tensor] = []
    identical = reference.logits.dtype == candidate.logits.dtype
    for chunk in row_chunks(rows, vocabulary, candidate.logits.device):
        left, right = reference.logits[chunk], candidate.logits[chunk].to(reference.logits.device)
        same_top.append((left.argmax(-1) == right.argmax(-1)).cpu())
        if left.dtype == right.dtype and torch.equal(left, right):
            kl.append(torch.zeros(left.shape[0], dtype=torch.float64))
            continue
        identical = False
        p, q = left.double().log_softmax(-1), right.double().log_softmax(-1)
        # KL is never negative; rounding can make it -1e-17 where p and q are all but equal
        kl.append((p.exp().mul_(p.sub_(q))).sum(-1).clamp_min_(0).cpu())
    return _Sides(torch.cat(kl), torch.cat(same_top), identical)


def _summarize(candidate: PerplexityResult, reference: PerplexityResult, sides: _Sides) -> DivergenceResult:
    kl = sides.kl
    if not bool(torch.isfinite(kl).all()):
        raise CheckpointError(
            f"the divergence of {int((~torch.isfinite(kl)).sum())} of {kl.numel()} positions is not finite; "
            "a model gives infinite logits: try another compute dtype or scheme."
        )
    same_top = sides.same_top
    sizes = candidate.losses.window_sizes
    mine, theirs = candidate.losses.nll.double(), reference.losses.nll.double()
    delta_p = (-mine).exp() - (-theirs).exp()
    ordered = kl.sort().values
    top1 = batch_means(same_top.double(), sizes)
    return DivergenceResult(
        kl=kl,
        same_top=same_top,
        delta_p=delta_p,
        window_sizes=sizes,
        protocol=candidate.protocol(),
        kl_mean=batch_means(kl, sizes),
        kl_median=_quantile(ordered, 0.5),
        kl_p99=_quantile(ordered, 0.99),
        kl_p999=_quantile(ordered, 0.999),
        kl_max=float(ordered[-1]),
        top1_agreement=top1,
        top1_binomial_stderr=(top1.value * (1 - top1.value) / same_top.numel()) ** 0.5,
        delta_ln_perplexity=batch_means(mine - theirs, sizes),
        rms_delta_p=_root(batch_means(delta_p.square(), sizes)),
        identical=sides.identical,
    )


def _quantile(ordered: Tensor, share: float) -> float:
    """The `share` quantile of ascending values [n], linear between neighbours; torch.quantile refuses more than 16 M values."""
    position = share * (ordered.numel() - 1)
    below = int(position)
    above = min(below + 1, ordered.numel() - 1)
    return float(torch.lerp(ordered[below], ordered[above], position - below))


def _root(square: Estimate) -> Estimate:
    """The root of an estimate, its error to first order: d sqrt(x) = dx / (2 sqrt(x))."""
    root = square.value**0.5
    return Estimate(root, None if square.stderr is None else square.stderr / (2 * root) if root else 0.0)
