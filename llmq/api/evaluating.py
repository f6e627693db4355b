"""Quality: perplexity under a named protocol, divergence from a reference, lm-eval tasks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from llmq.algorithms.report import LayerReport
from llmq.api.loading import Loaded, Setup, open_model
from llmq.api.recipes import HEAD, Recipe, linear_fqns
from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.overlap import overlap
from llmq.errors import UsageError
from llmq.evaluation.divergence import DivergenceResult, evaluate_candidate
from llmq.evaluation.harness import TaskOptions, run_tasks
from llmq.evaluation.losses import PairedDifference, load_losses, paired_difference, save_losses
from llmq.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from llmq.evaluation.protocols import PerplexityProtocol, resolve_protocol
from llmq.evaluation.reference import ReferenceLogits
from llmq.evaluation.scoring import LanguageModel
from llmq.evaluation.through_cache import scored_with
from llmq.files import check_absent
from llmq.model.kv_cache import AUTO, kv_name
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import record_usage
from llmq.progress import SILENT, Progress
from llmq.ranks import join_ranks
from llmq.results.binning import histogram
from llmq.results.record import Details, Metric, Protocol, ResultRecord
from llmq.results.tokens import TokenFigures


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a model's quality. None takes the default: of the text, the window length, and no limit."""

    text: str | None = None
    protocol: str = "windows"
    window: int | None = None
    limit: int | None = None

    def read(self) -> TextSource:
        """Find the text."""
        return resolve_text(self.text, split="test")

    def resolve(self, context: int) -> PerplexityProtocol:
        """Settle the protocol for a model that reads `context` tokens."""
        return resolve_protocol(self.protocol, {"length": self.window, "limit": self.limit}, context=context)


@dataclass(frozen=True, slots=True)
class EvaluationFiles:
    """Where per-token losses are stored, and earlier ones to compare with."""

    losses: Path | None = None
    versus: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Evaluation:
    """One model's figures."""

    records: list[ResultRecord]
    perplexity: PerplexityResult
    divergence: DivergenceResult | None = None
    versus: PairedDifference | None = None
    notes: list[str] = field(default_factory=list)


def evaluate_model(
    path: str,
    recipe: Recipe | None = None,
    setup: Setup | None = None,
    question: Question | None = None,
    *,
    reference: str | None = None,
    files: EvaluationFiles | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure the perplexity of a checkpoint and, with a `reference` checkpoint, its divergence from it.

    Args:
        path: the checkpoint.
        recipe: a scheme to apply first; None: the checkpoint as it is.
        setup: where and how it runs.
        question: text and protocol.
        reference: another checkpoint, run in the same dtype on the same tokens, with a KV cache in its own dtype.
        files: losses to write, and to compare with.
        progress: is told how far it is, in the first process of several.

    Under `torchrun` the windows are shared by its processes. All of them get the same result; the first writes the files.
    """
    setup, question, files = setup or Setup(), question or Question(), files or EvaluationFiles()
    ranks = join_ranks(setup.device)
    progress = progress if ranks.first else SILENT
    with ranks.together():
        if files.losses and ranks.first:
            check_absent(files.losses, force=files.force)
        earlier = load_losses(files.versus) if files.versus and ranks.first else None
        text = question.read()
        loaded = open_model(path, recipe, setup, progress=progress)
        protocol = question.resolve(loaded.model.config.max_position_embeddings)
        other = open_model(reference, None, replace(setup, kv_cache=AUTO), progress=progress) if reference else None
        if other is not None and other.model.config.vocab_size != loaded.model.config.vocab_size:
            raise UsageError(
                f"{path} and the reference {reference} have vocabularies of {loaded.model.config.vocab_size} and "
                f"{other.model.config.vocab_size} tokens; a divergence is only defined between models of one vocabulary."
            )
    ranks.check_same(_facts(loaded, other, text, protocol))
    against = None
    with record_usage() as usage:
        if other is None:
            perplexity = evaluate_perplexity(scored(loaded), loaded.tokenizer, text, protocol, ranks=ranks, progress=progress)
        else:
            with ReferenceLogits(other.runner, other.tokenizer, text, protocol, budget_bytes=0) as logits:
                both = evaluate_candidate(
                    scored(loaded), loaded.tokenizer, text, protocol, reference=logits, ranks=ranks, progress=progress
                )
            perplexity, against = both.perplexity, (both.divergence, other)
    kernels: dict[str, int] = {}
    for used in ranks.gather_json(usage.linears()):
        kernels |= {name: max(count, kernels.get(name, 0)) for name, count in used.items()}
    notes = notes_of(loaded, text)
    if ranks.size > 1:
        notes.append(f"the windows were shared by {ranks.size} processes, which changes no figure")
    records = quality_records(loaded, perplexity, against, kernels, notes)
    with ranks.together():
        if files.losses and ranks.first:
            subject = f"{loaded.name} {loaded.scheme}, KV cache {kv_name(loaded.kv_dtype)}"
            save_losses(replace(perplexity.losses, subject=subject), files.losses, force=files.force)
    versus = paired_difference(earlier, perplexity.losses) if earlier else None
    return Evaluation(records, perplexity, against[0] if against else None, versus, notes)


def _facts(loaded: Loaded, other: Loaded | None, text: TextSource, protocol: PerplexityProtocol) -> dict[str, Any]:
    """Return what has to be the same in all processes, so that they compute what one would."""
    return {
        "model": loaded.checkpoint.sha256,
        "scheme": loaded.scheme,
        "options": loaded.options,
        "tokenizer": loaded.tokenizer.sha256,
        "reference": other.checkpoint.sha256 if other is not None else None,
        "text": text.sha256,
        "protocol": protocol.describe().model_dump(mode="json"),
        "dtype": loaded.setup.dtype,
        "kv_cache": kv_name(loaded.kv_dtype),
        "runtime": loaded.runtime.name,
        "kernels": sorted({choice.kernels for choice in loaded.choices}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def scored(loaded: Loaded) -> LanguageModel:
    """The model as its quality is measured: behind its KV cache."""
    return scored_with(loaded.runner, loaded.kv_dtype)


def quality_records(
    loaded: Loaded,
    perplexity: PerplexityResult,
    divergence: tuple[DivergenceResult, Loaded] | None,
    kernels: dict[str, int],
    notes: list[str],
) -> list[ResultRecord]:
    """Make the records of one evaluation; a divergence comes with the reference that it is measured from."""
    subject, environment = loaded.subject(), loaded.setup.environment()
    tokens = token_figures(perplexity, divergence[0] if divergence is not None else None)
    found = [
        ResultRecord(
            kind="perplexity",
            subject=subject,
            protocol=perplexity.protocol(),
            metrics=perplexity.metrics(),
            kernels=kernels,
            environment=environment,
            notes=notes,
            details=Details(layers=layer_figures(loaded)),
        ).with_tokens(tokens)
    ]
    if divergence is not None:
        measured, reference = divergence
        named = {
            "reference": f"{reference.name} {reference.scheme}",
            "reference_sha256": reference.checkpoint.sha256,
            "reference_dtype": reference.setup.dtype,
        }
        found.append(
            ResultRecord(
                kind="divergence",
                subject=subject,
                protocol=measured.protocol.model_copy(update={"params": measured.protocol.params | named}),
                metrics=measured.metrics(),
                kernels=kernels,
                environment=environment,
                notes=notes,
                details=Details(histograms={"kl": histogram(measured.kl.numpy(), "nats", per_decade=_BINS)}),
            ).with_tokens(tokens)
        )
    return found


_BINS = 5
"""Of a histogram of divergences, between 1 and 10."""


def token_figures(perplexity: PerplexityResult, divergence: DivergenceResult | None) -> TokenFigures:
    """Return what is stored of every scored token, in fp32."""
    losses = perplexity.losses
    return TokenFigures(
        nll=losses.nll.numpy(),
        window_sizes=losses.window_sizes.numpy(),
        kl=None if divergence is None else divergence.kl.float().numpy(),
        same_top=None if divergence is None else divergence.same_top.numpy(),
    )


def layer_figures(loaded: Loaded) -> dict[str, dict[str, Metric]]:
    """Return what is known of each quantized linear: bits, noise of the weight, loss and that of rounding to nearest."""
    manifest = loaded.checkpoint.manifest
    reports = {report.fqn: report for report in loaded.reports or map(LayerReport.from_json, manifest.layers if manifest else ())}
    noise = {row.fqn: row.sqnr_db for row in loaded.coverage.rows} if loaded.coverage is not None else {}
    found: dict[str, dict[str, Metric]] = {}
    for fqn, module in loaded.model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, QuantizedTensor) or not weight.format.quantized:
            continue
        report = reports.get(fqn)
        figures = {
            "bits_per_weight": (weight.format.weight.bits_per_weight(weight.shape[1]), "bits"),
            "sqnr": (report.sqnr_db if report else noise.get(fqn), "dB"),
            "loss": (report.loss if report else None, "1"),
            "rtn_loss": (report.rtn_loss if report else None, "1"),
        }
        found[fqn] = {
            name: Metric(value=value, unit=unit)
            for name, (value, unit) in figures.items()
            if value is not None and isfinite(value)
        }
    return found


def notes_of(loaded: Loaded, text: TextSource) -> list[str]:
    """What a reader of the figures has to know: what ran, what was skipped, what fell back, whether calibration saw it."""
    notes = [*loaded.checkpoint.notes, loaded.runtime.note]
    if loaded.coverage is not None:
        linears = set(linear_fqns(loaded.model)) - {HEAD}
        notes += [f"{fqn} left alone: {reason}" for fqn, reason in loaded.coverage.skipped.items() if fqn in linears]
    notes += [f"{report.fqn}: {report.fallback}" for report in loaded.reports if report.fallback]
    if loaded.calibration is not None:
        shared = overlap(loaded.calibration.text(loaded.tokenizer), text.raw())
        if shared.warning:
            notes.append(shared.warning)
    return notes


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Which lm-eval tasks to run, and how."""

    tasks: list[str]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None


def evaluate_on_tasks(
    path: str, recipe: Recipe | None, setup: Setup, request: TaskRequest, *, progress: Progress = SILENT
) -> list[ResultRecord]:
    """Run lm-eval tasks on a checkpoint; one record a task."""
    loaded = open_model(path, recipe, setup, progress=progress)
    options = TaskOptions(request.limit, request.num_fewshot, request.include_path, None, setup.seed, loaded.kv_dtype)
    with record_usage() as usage:
        results = run_tasks(
            loaded.runner,
            loaded.tokenizer,
            request.tasks,
            options=options,
            progress=progress,
        )
    subject, environment = loaded.subject(), setup.environment()
    records = []
    for task in dict.fromkeys(score.task for score in results.scores):
        scores = [score for score in results.scores if score.task == task]
        params = {
            "task": task,
            "task_version": scores[0].task_version,
            "num_fewshot": scores[0].num_fewshot,
            "n_documents": scores[0].n_documents,
            "limit": request.limit,
            "max_length": results.max_length,
            "bos": results.bos,
            "lm_eval": results.lm_eval_version,
        }
        records.append(
            ResultRecord(
                kind="tasks",
                subject=subject,
                protocol=Protocol(name="lm-eval", version=1, params=params),
                metrics={
                    score.metric if score.filter == "none" else f"{score.metric},{score.filter}": score.metric_record()
                    for score in scores
                },
                kernels=usage.linears(),
                environment=environment,
                notes=[loaded.runtime.note],
            )
        )
    return records
