"""What `llmq ci` measures: every scheme of a recipe, its quality first, then the speed of those that are paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmq.api.calibrating import CalibrationSource
from llmq.api.comparing import SpeedQuestion, measure_quality
from llmq.api.diffing import ITSELF, RATIO_TO
from llmq.api.evaluating import Question, notes_of, quality_records, scored
from llmq.api.gate_recipe import GatePaths, GateRecipe, SchemeEntry, SpeedPair
from llmq.api.loading import Loaded, Setup, open_model
from llmq.api.recipes import Recipe
from llmq.benchmark.decode import bench_models
from llmq.benchmark.order_statistics import paired_ratios, summarize
from llmq.benchmark.speed import BenchPlan
from llmq.calibration.corpus import TextSource
from llmq.checkpoint import open_checkpoint
from llmq.errors import UsageError
from llmq.evaluation.perplexity import evaluate_perplexity
from llmq.evaluation.reference import ReferenceLogits
from llmq.model.kv_cache import AUTO
from llmq.ops.usage import record_usage
from llmq.progress import SILENT, Named, Progress
from llmq.results.record import Metric, ResultRecord


@dataclass
class Gate:
    """What is measured: the recipe's schemes, or those that a model in place of the recipe's can be.

    Attributes:
        recipe: as it was read.
        paths: that it names.
        model: what is judged; None: the recipe's own model.
        entries: the schemes that are measured.
        loaded: models whose speed is measured, by the entry's id.
        context: of the model, in tokens; known when it is loaded.
    """

    recipe: GateRecipe
    paths: GatePaths
    model: Path | None = None
    entries: tuple[SchemeEntry, ...] = ()
    loaded: dict[str, Loaded] = field(default_factory=dict)
    context: int = 0

    def __post_init__(self) -> None:
        """Find which schemes are measured: all, or the one that an artefact was made with.

        Raises:
            UsageError: a scheme or option is unknown, or the artefact is of none of the recipe's schemes.
        """
        for entry in self.recipe.scheme:
            self.recipe_of(entry).resolve()
        self.entries = self.recipe.scheme
        manifest = open_checkpoint(str(self.model)).manifest if self.model is not None else None
        if manifest is None:
            return
        self.entries = tuple(
            entry
            for entry in self.recipe.scheme
            if entry.name == manifest.scheme and self.recipe_of(entry).resolve().options_json() == manifest.options
        )
        if not self.entries or manifest.overrides:
            own = ", ".join(f"{entry.name} {entry.options}" for entry in self.recipe.scheme)
            raise UsageError(
                f"{self.model} was made with {manifest.scheme} {manifest.options}, and the recipe has {own}; "
                "name an artefact of one of these, or an original checkpoint."
            )

    @property
    def partial(self) -> bool:
        """Whether a part of the recipe's schemes is left out."""
        return len(self.entries) < len(self.recipe.scheme)

    @property
    def pairs(self) -> tuple[SpeedPair, ...]:
        """The speed pairs whose candidate is measured."""
        measured = {entry.id for entry in self.entries}
        return tuple(pair for pair in (self.recipe.speed.pair if self.recipe.speed else ()) if pair.candidate in measured)

    @property
    def setup(self) -> Setup:
        """Where and how everything runs."""
        asked = self.recipe
        return Setup(dtype=asked.dtype, threads=asked.threads, seed=asked.seed, kv_cache=asked.kv_cache)

    def recipe_of(self, entry: SchemeEntry) -> Recipe:
        """What is done to the linears for an entry."""
        asked = self.recipe.calibration
        source = CalibrationSource(str(self.paths.calibration), asked.windows, asked.length)
        return Recipe(entry.name, entry.options, calibration=source)

    def open(self, entry: SchemeEntry, progress: Progress) -> Loaded:
        """Load what is judged, or, for the other side of a speed pair that it cannot be, the recipe's own model."""
        artefact = self.model is not None and open_checkpoint(str(self.model)).manifest is not None
        if artefact and entry in self.entries:
            return open_model(str(self.model), None, self.setup, progress=progress)
        path = self.paths.model if self.model is None or artefact else self.model
        return open_model(str(path), self.recipe_of(entry), self.setup, progress=progress)


def measure_gate(gate: Gate, *, speed: bool, progress: Progress = SILENT) -> list[ResultRecord]:
    """Measure the quality of every scheme, and keep the models whose speed is to be measured.

    Divergence is measured from the recipe's own model whatever is judged, so that it is comparable with the baseline's. A model
    with another tokenizer has no divergence from it; its perplexity is measured, so that there is something to refuse.
    """
    recipe = gate.recipe
    question = Question(str(gate.paths.text), recipe.text.protocol, recipe.text.window, recipe.text.limit)
    text = question.read()
    plain = replace(gate.setup, kv_cache=AUTO)
    reference = open_model(str(gate.paths.model), Recipe(recipe.reference), plain, progress=progress)
    gate.context = reference.model.config.max_position_embeddings
    protocol = question.resolve(gate.context)
    paired = {name for pair in gate.pairs for name in (pair.candidate, pair.against)} if speed else set()
    records: list[ResultRecord] = []
    with ReferenceLogits(reference.runner, reference.tokenizer, text, protocol) as logits:
        logits.perplexity(progress=progress)
        for entry in recipe.scheme:
            if entry not in gate.entries and entry.id not in paired:
                continue
            told = Named(entry.id, progress)
            loaded = gate.open(entry, told)
            if entry in gate.entries:
                records += _quality(loaded, (reference, logits), text, told)
            if entry.id in paired:
                gate.loaded[entry.id] = loaded
    return [_renamed(record, reference.name) for record in records]


def _quality(
    loaded: Loaded, reference: tuple[Loaded, ReferenceLogits], text: TextSource, progress: Progress
) -> list[ResultRecord]:
    other, logits = reference
    if loaded.tokenizer.sha256 == other.tokenizer.sha256:
        return measure_quality(loaded, reference, text, progress)
    with record_usage() as usage:
        alone = evaluate_perplexity(scored(loaded), loaded.tokenizer, text, logits.plan.protocol, progress=progress)
    return quality_records(loaded, alone, None, usage.linears(), notes_of(loaded, text))


def measure_speed(gate: Gate, *, progress: Progress = SILENT) -> list[ResultRecord]:
    """Measure the loaded models in the same rounds, all of them twice a round: A B A B.

    What a model finds in the caches depends on which one ran before it, so the second half has the order of the first.

    Returns:
        A prefill and a decode record a model. That of a pair's candidate has its ratio to the other scheme (`ratio_to ID`), and
        that of the other scheme's first measurement to its second (`ratio_of_itself ID`), taken within rounds.
    """
    names = list(gate.loaded)
    models = [*gate.loaded.values()] * 2
    reports = bench_models(
        [loaded.runner for loaded in models],
        _plan(gate),
        kv_dtypes=[loaded.kv_dtype for loaded in models],
        progress=progress,
    )
    measured = [
        report.records(loaded.subject(), loaded.setup.environment(), notes=[loaded.runtime.note])
        for loaded, report in zip(models, reports, strict=True)
    ]
    halves = [dict(zip(names, half, strict=True)) for half in (measured[: len(names)], measured[len(names) :])]
    found = []
    for name in names:
        for index, record in enumerate(halves[0][name]):
            ratios: dict[str, Metric] = {}
            for pair in gate.pairs:
                if (pair.candidate, pair.phase) == (name, record.kind):
                    own, base = ([_rates(half[each][index]) for half in halves] for each in (name, pair.against))
                    both = [ratio for half in (0, 1) for ratio in paired_ratios(own[half], base[half])]
                    ratios[RATIO_TO + pair.against] = _ratio(both)
                    ratios[ITSELF + pair.against] = _ratio(paired_ratios(base[0], base[1]))
            found.append(record.model_copy(update={"metrics": record.metrics | ratios}))
    return [_renamed(record, gate.paths.model.name) for record in found]


def _plan(gate: Gate) -> BenchPlan:
    asked = gate.recipe.speed
    assert asked is not None  # there is a pair
    return SpeedQuestion(asked.prompt_length, asked.new_tokens, asked.repeats).plan(gate.context, gate.recipe.seed)


def _rates(record: ResultRecord) -> Sequence[float]:
    samples = record.metrics["tokens_per_s"].samples
    assert samples is not None  # of a measurement that has just been made
    return samples


def _ratio(ratios: list[float]) -> Metric:
    """Return the median of ratios that were taken within rounds."""
    found = summarize(ratios)
    return Metric(value=found.median, unit="1", stderr=found.stderr, samples=ratios)


def _renamed(record: ResultRecord, name: str) -> ResultRecord:
    """Give a record the name of the recipe's model, whatever folder took its place."""
    return record.model_copy(update={"subject": record.subject.model_copy(update={"model": name})})
