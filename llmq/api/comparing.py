"""The main job: several schemes on one checkpoint, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import psutil

from llmq.api.benching import machine_bandwidth
from llmq.api.calibrating import CalibrationSource
from llmq.api.evaluating import Question, notes_of, quality_records, scored
from llmq.api.loading import DTYPES, Loaded, Setup, open_model
from llmq.api.recipes import Recipe
from llmq.benchmark.decode import bench_model, bench_models
from llmq.benchmark.machine import Bandwidth
from llmq.benchmark.speed import BenchPlan
from llmq.calibration.corpus import TextSource
from llmq.errors import UsageError, suggest
from llmq.evaluation.divergence import evaluate_candidate
from llmq.evaluation.reference import ReferenceLogits
from llmq.model.kv_cache import AUTO, kv_dtype
from llmq.ops.usage import record_usage
from llmq.progress import SILENT, Named, Progress
from llmq.results.record import ResultRecord
from llmq.results.table import Table, comparison_table
from llmq.schemes.registry import get_scheme

_RESIDENT_SHARE = 0.5
"""Share of the free memory that all models together may take, for their speed to be measured in turns."""


_BUDGET_S = 120.0
"""A timing that would take longer ends early, after three repeats at the least: some kernels are slow on some machines."""
_PROMPT, _NEW_TOKENS = 128, 64
"""Tokens of the benched prompt, and decoded after it, where the model's context has room for them."""


@dataclass(frozen=True, slots=True)
class SpeedQuestion:
    """What is asked of a model's speed; None takes what suits the model's context."""

    prompt_length: int | None = None
    new_tokens: int | None = None
    repeats: int = 5

    def plan(self, context: int, seed: int) -> BenchPlan:
        """Settle it for a model that reads `context` tokens; raises UsageError when what was asked for does not fit."""
        plan = BenchPlan(
            prompt_lengths=(self.prompt_length or min(_PROMPT, context // 2),),
            new_tokens=self.new_tokens or min(_NEW_TOKENS, context // 4),
            repeats=self.repeats,
            seed=seed,
            budget_s=_BUDGET_S,
        )
        plan.check(context)
        return plan


@dataclass(frozen=True)
class CompareRequest:
    """What to compare, and how. `bench` None measures quality only."""

    model: str
    schemes: list[str]
    options: Mapping[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    skip_unfit: bool = False
    lm_head: bool = False
    calibration: CalibrationSource = field(default_factory=CalibrationSource)
    question: Question = field(default_factory=Question)
    reference: str = "bf16"
    bench: SpeedQuestion | None = field(default_factory=SpeedQuestion)
    kv_caches: tuple[str, ...] | None = None
    """KV caches that every scheme is measured with; None: that of the setup."""

    def recipes(self) -> list[Recipe]:
        """One recipe a scheme; raises UsageError for a name or an option that no scheme has."""
        if not self.schemes:
            raise UsageError("no scheme is named; name at least one with --schemes, such as bf16,int4.")
        twice = {name for name in self.schemes if self.schemes.count(name) > 1}
        if twice:
            raise UsageError(f"scheme {min(twice)} is named twice in --schemes; name each once.")
        found = [
            Recipe(name, self.options_of(name), self.skip, self.skip_unfit, self.lm_head, self.calibration)
            for name in self.schemes
        ]
        for key in self.options:
            if not any(key.rpartition(":")[2] in recipe.options for recipe in found):
                known = sorted({option for name in self.schemes for option in get_scheme(name).Options.model_fields})
                raise UsageError(f"no scheme of this comparison has the option {key!r}.{suggest(key.rpartition(':')[2], known)}")
        for recipe in found:
            recipe.resolve()
        return found

    def caches(self, setup: Setup) -> tuple[str, ...]:
        """The KV caches by name; raises UsageError for one that does not exist or is named twice."""
        names = (setup.kv_cache,) if self.kv_caches is None else self.kv_caches
        if not names:
            raise UsageError(f"no KV cache is named; name at least one with --kv-cache, such as {AUTO},int8.")
        for name in names:
            kv_dtype(name, setup.torch_dtype)
            if names.count(name) > 1:
                raise UsageError(f"KV cache {name} is named twice; name each once.")
        return names

    def options_of(self, name: str) -> dict[str, str]:
        """The options for one scheme: those for every scheme that has them, then its own (`scheme:key`)."""
        known = get_scheme(name).Options.model_fields
        shared = {key: value for key, value in self.options.items() if ":" not in key and key in known}
        own = {
            key.partition(":")[2]: value for key, value in self.options.items() if key.partition(":")[0] == name and ":" in key
        }
        return shared | own


@dataclass(frozen=True)
class Comparison:
    """The table, and the records it is made of."""

    table: Table
    records: list[ResultRecord]


def compare_schemes(request: CompareRequest, setup: Setup | None = None, *, progress: Progress = SILENT) -> Comparison:
    """Apply each scheme to the checkpoint and measure what it costs and what it buys.

    Quality is measured against the baseline `request.reference`, with a KV cache in its own dtype, on the same tokens; speed in
    turns, A B C A B C …, where all models fit into memory together.

    Raises:
        LlmqError: see `open_model`; names, options and text are checked before anything is loaded.
    """
    setup = setup or Setup()
    recipes, caches = request.recipes(), request.caches(setup)
    setup = replace(setup, kv_cache=AUTO)
    if request.reference not in DTYPES:
        raise UsageError(f"unknown reference {request.reference!r}.{suggest(request.reference, list(DTYPES))}")
    text = request.question.read()
    progress.note(f"evaluation text: {text.name}, {text.origin}")
    reference = open_model(request.model, Recipe(request.reference), setup, progress=progress)
    context = reference.model.config.max_position_embeddings
    protocol = request.question.resolve(context)
    plan = None if request.bench is None else request.bench.plan(context, setup.seed)
    resident = _fits(reference, len(recipes))
    records: list[ResultRecord] = []
    models: list[Loaded] = []
    bandwidth = machine_bandwidth(reference.setup, progress) if plan else None
    with ReferenceLogits(reference.runner, reference.tokenizer, text, protocol) as logits:
        logits.perplexity(progress=progress)
        for recipe in recipes:
            told = Named(recipe.scheme, progress)
            opened = reference if recipe.scheme == request.reference else open_model(request.model, recipe, setup, progress=told)
            # two names of one cache, such as auto and bf16, are one measurement
            for loaded in {other.kv_dtype: other for other in map(opened.with_kv_cache, caches)}.values():
                records += measure_quality(loaded, (reference, logits), text, told)
                if plan and resident:
                    models.append(loaded)
                elif plan:
                    records += measure_speed(loaded, plan, bandwidth, told)
    if plan and resident:
        kv_dtypes = [loaded.kv_dtype for loaded in models]
        turns = [loaded.runner for loaded in models]
        reports = bench_models(turns, plan, kv_dtypes=kv_dtypes, bandwidth=bandwidth, progress=progress)
        for loaded, report in zip(models, reports, strict=True):
            records += report.records(loaded.subject(), loaded.setup.environment(), notes=[loaded.runtime.note])
    elif plan:
        progress.note("speed was measured one scheme after another: all models together do not fit into memory")
    return Comparison(comparison_table(records), records)


def measure_quality(
    loaded: Loaded, reference: tuple[Loaded, ReferenceLogits], text: TextSource, progress: Progress
) -> list[ResultRecord]:
    """Perplexity and divergence of one candidate from the reference and its logits, from one pass."""
    other, logits = reference
    with record_usage() as usage:
        both = evaluate_candidate(
            scored(loaded), loaded.tokenizer, text, logits.plan.protocol, reference=logits, progress=progress
        )
    return quality_records(loaded, both.perplexity, (both.divergence, other), usage.linears(), notes_of(loaded, text))


def measure_speed(loaded: Loaded, plan: BenchPlan, bandwidth: Bandwidth | None, progress: Progress) -> list[ResultRecord]:
    """Prefill and decode of one candidate by itself."""
    report = bench_model(loaded.runner, plan, kv_dtype=loaded.kv_dtype, bandwidth=bandwidth, progress=progress)
    return report.records(loaded.subject(), loaded.setup.environment(), notes=[loaded.runtime.note])


def _fits(reference: Loaded, count: int) -> bool:
    weights = sum(info.nbytes for info in reference.checkpoint.tensors.values())
    return weights * count < _RESIDENT_SHARE * int(psutil.virtual_memory().available)
