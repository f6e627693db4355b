"""Perplexity under a named protocol, with its standard error and every token's loss.

    perplexity = exp(Σ nll / n),  nll = -ln p(token | what the protocol lets the model read),  n = scored tokens

Losses come from an fp32 log-softmax and are summed in double precision. Everything that makes two figures comparable or not
is part of the result: protocol and parameters, text hash, tokenizer hash, BOS policy, dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, isfinite, log

import torch
from torch import Tensor

from llmq.calibration.corpus import TextSource
from llmq.evaluation.estimates import Estimate, batch_means, batch_sums, naive_stderr, ratio_estimate
from llmq.evaluation.losses import TokenLosses
from llmq.evaluation.protocols import DocumentSize, PerplexityProtocol, Window, check_length
from llmq.evaluation.scoring import Batching, LanguageModel, batches, check_vocabulary, slabs, token_losses
from llmq.evaluation.shared import SharedBatches
from llmq.model.tokenizer import Tokenizer
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks
from llmq.results import record
from llmq.results.record import Metric


@dataclass(frozen=True, eq=False)
class Plan:
    """A text cut into windows: the same for every model that has the same tokenizer."""

    protocol: PerplexityProtocol
    windows: list[Window]
    bos: str
    documents: tuple[DocumentSize, ...] | None
    text: str
    text_sha256: str
    tokenizer_sha256: str

    @property
    def window_sizes(self) -> Tensor:
        """Int32 [W]: scored tokens of each window."""
        return torch.tensor([window.targets.numel() for window in self.windows], dtype=torch.int32)

    @property
    def n_scored_tokens(self) -> int:
        """Scored tokens of all windows."""
        return sum(window.targets.numel() for window in self.windows)


@dataclass(frozen=True, slots=True)
class OriginalText:
    """The same loss per word and per byte of the original text; documents are the independent units of the standard errors."""

    word_perplexity: Estimate
    """Infinite where the text has so few blanks that the exponential overflows."""
    byte_perplexity: Estimate
    bits_per_byte: Estimate
    n_words: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class PerplexityResult:
    """What one model makes of one text under one protocol."""

    losses: TokenLosses
    bos: str
    """The BOS policy that was applied, in words."""
    mean_nll: Estimate
    """Nats/token; standard error by batch means over windows."""
    naive_stderr: float | None
    """Standard error of `mean_nll` as if tokens were independent: what other tools print, and too small."""
    perplexity: Estimate
    original: OriginalText | None
    """None where the protocol does not score all of the text."""

    @property
    def n_windows(self) -> int:
        """Windows evaluated."""
        return self.losses.window_sizes.numel()

    @property
    def n_scored_tokens(self) -> int:
        """Tokens scored."""
        return self.losses.nll.numel()

    def protocol(self) -> record.Protocol:
        """The protocol for a result record: its parameters, the text, and all else that must agree to compare two results."""
        return self.losses.protocol.model_copy(
            update={
                "params": self.losses.protocol.params
                | {
                    "bos": self.bos,
                    "text": self.losses.text,
                    "text_sha256": self.losses.text_sha256,
                    "n_windows": self.n_windows,
                    "n_scored_tokens": self.n_scored_tokens,
                }
            }
        )

    def metrics(self) -> dict[str, Metric]:
        """The figures for a result record; one that is not finite is left out."""
        found = {"perplexity": (self.perplexity, "1"), "nll": (self.mean_nll, "nats/token")}
        if self.original is not None:
            found["word_perplexity"] = (self.original.word_perplexity, "1")
            found["byte_perplexity"] = (self.original.byte_perplexity, "1")
            found["bits_per_byte"] = (self.original.bits_per_byte, "bits/byte")
        return {
            name: Metric(value=estimate.value, unit=unit, stderr=estimate.stderr)
            for name, (estimate, unit) in found.items()
            if isfinite(estimate.value)
        }


def plan_evaluation(tokenizer: Tokenizer, text: TextSource, protocol: PerplexityProtocol) -> Plan:
    """Tokenize `text` and cut it into the protocol's windows.

    Raises:
        TextError: the text is too short for one window.
    """
    pieces = protocol.cut(tokenizer, text)
    return Plan(protocol, pieces.windows, pieces.bos, pieces.documents, text.name, text.sha256, tokenizer.sha256)


def check_plan(plan: Plan, model: LanguageModel) -> None:
    """Raise UsageError or TokenizerError when `model` cannot read the plan's windows."""
    check_length(plan.protocol, model.config.max_position_embeddings)
    check_vocabulary(plan.windows, model)


def evaluate_perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: TextSource,
    protocol: PerplexityProtocol,
    *,
    batching: Batching | None = None,
    ranks: Ranks | None = None,
    progress: Progress = SILENT,
) -> PerplexityResult:
    """Measure the perplexity of `model` on `text`.

    Args:
        model: runs as it is: prepared or not, in whatever dtype and on whatever device it is.
        tokenizer: the checkpoint's.
        text: what is scored.
        protocol: from `protocols.resolve_protocol`; its `limit` keeps the first windows or documents only.
        batching: how much is computed at once; results depend on it by rounding only.
        ranks: the processes that share the windows; all get the result, which is that of one process, bit for bit.
        progress: is told of every window of this process.

    Raises:
        TextError: the text is too short for one window.
        UsageError: the windows are longer than the model's context.
        TokenizerError: the tokenizer does not fit the model.
        CheckpointError: a loss is not finite.
    """
    plan = plan_evaluation(tokenizer, text, protocol)
    check_plan(plan, model)
    batching, ranks = batching or Batching(), ranks or Ranks()
    cut = list(batches(plan.windows, batching))
    shared = SharedBatches(cut, ranks)
    parts: list[Tensor] = []
    dtype = ""
    with ranks.together(), progress.task(f"perplexity ({protocol.name})", shared.windows) as advance, torch.no_grad():
        for index in shared.indices:
            for slab in slabs(model, cut[index], batching):
                parts.append(token_losses(slab))
                dtype = dtype_name(slab.logits.dtype)
            advance(len(cut[index]))
    return summarize(plan, shared.joined(parts, torch.float32), shared.word(dtype))


def summarize(plan: Plan, nll: Tensor, dtype: str) -> PerplexityResult:
    """Make a result of the losses `nll` float32 [n] of all windows of `plan`; `dtype` is that of the logits."""
    sizes = plan.window_sizes
    losses = TokenLosses(nll, sizes, plan.protocol.describe(), plan.text, plan.text_sha256, plan.tokenizer_sha256, dtype)
    mean = batch_means(nll, sizes)
    original = None if plan.documents is None else _per_original(plan, plan.documents, nll)
    return PerplexityResult(losses, plan.bos, mean, naive_stderr(nll), _exp(mean), original)


def _per_original(plan: Plan, documents: tuple[DocumentSize, ...], nll: Tensor) -> OriginalText:
    of_window = torch.tensor([window.document for window in plan.windows])
    sums = torch.zeros(len(documents), dtype=torch.float64).index_add_(0, of_window, batch_sums(nll, plan.window_sizes))
    words = torch.tensor([document.words for document in documents])
    size = torch.tensor([document.bytes for document in documents])
    per_byte = ratio_estimate(sums, size)
    return OriginalText(
        word_perplexity=_exp(ratio_estimate(sums, words)),
        byte_perplexity=_exp(per_byte),
        bits_per_byte=_scale(per_byte, 1 / log(2)),
        n_words=int(words.sum()),
        n_bytes=int(size.sum()),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module: 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def _exp(mean: Estimate) -> Estimate:
    """The exponential of an estimate, its error to first order: d exp(x) = exp(x) dx."""
    try:
        return _scale(Estimate(1.0, mean.stderr), exp(mean.value))
    except OverflowError:
        return Estimate(inf, None)


def _scale(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, None if estimate.stderr is None else estimate.stderr * factor)
