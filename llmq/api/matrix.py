"""A matrix: schemes × group sizes × calibration sets × seeds on one checkpoint, which can stop at any point and go on there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import llmq
from llmq.api.benching import machine_bandwidth
from llmq.api.calibrating import CalibrationSource, calibration_set
from llmq.api.comparing import measure_quality, measure_speed
from llmq.api.loading import Loaded, Setup, open_model
from llmq.api.matrix_folder import MatrixFolder, open_folder
from llmq.api.matrix_recipe import CalibrationEntry, Cells, MatrixCell, MatrixRecipe, cell_key, cells_of, read_recipe
from llmq.api.matrix_table import MatrixRow, matrix_rows, matrix_table
from llmq.api.recipes import Recipe, settle
from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.mixture import parse_sources
from llmq.calibration.rows import HUB
from llmq.checkpoint import open_checkpoint
from llmq.errors import Interrupted
from llmq.evaluation.reference import ReferenceLogits
from llmq.files import sha256_file, sha256_text
from llmq.progress import SILENT, Named, Progress
from llmq.ranks import default_threads
from llmq.results.environment import cpu_name
from llmq.results.record import ResultRecord
from llmq.results.table import Table


@dataclass(frozen=True)
class MatrixResult:
    """What a matrix found.

    Attributes:
        table: one row a cell, its seeds joined.
        rows: the same as figures.
        records: of all cells, with their token figures.
        file: where they are stored.
    """

    table: Table
    rows: list[MatrixRow]
    records: list[ResultRecord]
    file: Path


def run_matrix(
    path: Path, out: Path, setup: Setup | None = None, *, restart: bool = False, progress: Progress = SILENT
) -> MatrixResult:
    """Measure every cell of a recipe that is not finished yet in the folder `out`, and join them.

    Args:
        path: the recipe.
        out: the folder, new or of an earlier run of the same matrix.
        setup: where it runs; dtype and seed are the recipe's.
        restart: throw away what an earlier run has measured.
        progress: is told of every cell, and how long the others will take.

    Raises:
        InputError: the recipe, the model or a text cannot be used.
        UsageError: the recipe names what there is not, or `out` is of another matrix.
        SchemeError: a scheme does not fit the model; found before anything is measured.
        OutputError: `out` cannot be written, or another process works in it.
        Interrupted: by the user; says how to go on.
    """
    recipe = read_recipe(path)
    cells = cells_of(recipe)
    setup = replace(setup or Setup(), dtype=recipe.dtype)
    work = _Matrix(recipe, path.parent, cells, setup, progress)
    progress.note(
        f"{len(cells.cells)} distinct cells, the reference among them, for {cells.combinations} combinations of scheme, group "
        "size, calibration set and seed"
    )
    with open_folder(out, work.identity(), restart=restart) as folder:
        try:
            work.measure(folder)
        except KeyboardInterrupt as error:
            done = len(_by_cell(folder.records()))
            raise Interrupted(
                f"interrupted; {done} of {len(cells.cells)} cells are finished in {out}: the same command goes on there."
            ) from error
        found = _by_cell(folder.records_with_tokens())
        records = [record for cell in cells.cells for record in found[cell.key]]
        rows = matrix_rows(records, recipe.reference)
        return MatrixResult(matrix_table(rows, records), rows, records, folder.runs)


def _numbered(data: Any) -> Any:
    """Return plain data with the tables of a list under their numbers, so that a difference between two is named by them."""
    if isinstance(data, dict):
        return {key: _numbered(value) for key, value in data.items()}
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return {str(number): _numbered(value) for number, value in enumerate(data, start=1)}
    return data


def _by_cell(records: Sequence[ResultRecord]) -> dict[str, list[ResultRecord]]:
    found: dict[str, list[ResultRecord]] = {}
    for record in records:
        found.setdefault(cell_key(record.subject.scheme, record.subject.options), []).append(record)
    return found


class _Matrix:
    """A recipe, and how it is measured."""

    def __init__(self, recipe: MatrixRecipe, folder: Path, cells: Cells, setup: Setup, progress: Progress) -> None:
        self.recipe, self.cells, self.setup, self.progress = recipe, cells, setup, progress
        self.home = folder
        self.model = str(folder / recipe.model)
        self.question = recipe.question(folder)
        self.text: TextSource = self.question.read()

    def identity(self) -> dict[str, Any]:
        """Return all that the figures depend on; what differs here is another matrix."""
        return {
            "recipe": _numbered(self.recipe.model_dump(mode="json")),
            "checkpoint_sha256": open_checkpoint(self.model).sha256,
            "text_sha256": self.text.sha256,
            "calibration_sha256": self._source_hashes(),
            "device": self.setup.device,
            "threads": self.setup.threads or default_threads(),
            "kernel": self.setup.kernel,
            "runtime": self.setup.runtime,
            "cpu": cpu_name(),
            "llmq": llmq.__version__,
            "torch": torch.__version__,
            "recipe_sha256": sha256_text(self.recipe.model_dump_json()),
        }

    def _sources(self, entry: CalibrationEntry) -> tuple[str, ...]:
        return tuple(name if name.startswith(HUB) else str(self.home / name) for name in entry.sources)

    def _source_hashes(self) -> dict[str, list[str]]:
        """Return the hashes of the sources of each set that is used; folders and the hub are not read for that."""
        used = {cell.calibration.name: cell.calibration for cell in self.cells.cells if cell.calibration is not None}
        found: dict[str, list[str]] = {}
        for name, entry in used.items():
            sources = [weighted.source for weighted in parse_sources(self._sources(entry))]
            files = [Path(source) for source in sources if source is not None and Path(source).is_file()]
            found[name] = [sha256_file(file) for file in files] if entry.sources else [resolve_text(split="train").sha256]
        return found

    def measure(self, folder: MatrixFolder) -> None:
        """Measure the cells that have no records yet."""
        finished = _by_cell(folder.records())
        left = [cell for cell in self.cells.cells if cell.key not in finished]
        if len(left) < len(self.cells.cells):
            self.progress.note(f"going on after {len(self.cells.cells) - len(left)} of {len(self.cells.cells)} cells")
        if not left:
            return
        reference = open_model(self.model, Recipe(self.recipe.reference), self.setup, progress=self.progress)
        for cell in self.cells.cells:
            settle(self._recipe(cell), reference.model, reference.setup.torch_dtype)  # what does not fit is said now
        context = reference.model.config.max_position_embeddings
        speed = self.recipe.speed()
        plan = None if speed is None else speed.plan(context, self.setup.seed)
        bandwidth = machine_bandwidth(reference.setup, self.progress) if plan else None
        protocol = self.question.resolve(context)
        with ReferenceLogits(reference.runner, reference.tokenizer, self.text, protocol) as logits:
            logits.perplexity(progress=self.progress)
            with self.progress.task("cells", len(left)) as advance:
                clock = _Clock(len(left))
                for cell in left:
                    told = Named(cell.label, self.progress)
                    loaded = self._opened(cell, reference, folder, told)
                    records = measure_quality(loaded, (reference, logits), self.text, told)
                    if plan is not None:
                        records += measure_speed(loaded, plan, bandwidth, told)
                    folder.add([_with_axes(record, cell) for record in records])
                    advance(1)
                    self.progress.note(f"{cell.label}: {clock.tick()}")

    def _recipe(self, cell: MatrixCell, source: CalibrationSource | None = None) -> Recipe:
        recipe = self.recipe
        options = cell.resolved.options_json()
        return Recipe(cell.resolved.name, options, recipe.skip, recipe.skip_unfit, recipe.lm_head, source or CalibrationSource())

    def _opened(self, cell: MatrixCell, reference: Loaded, folder: MatrixFolder, told: Progress) -> Loaded:
        """Return the cell's model; its calibration set is recorded when its first cell comes, and read by the others."""
        if cell.calibration is None or cell.seed is None:
            alike = cell.key == self.cells.cells[0].key
            return reference if alike else open_model(self.model, self._recipe(cell), self.setup, progress=told)
        setup = replace(self.setup, seed=cell.seed)
        file = folder.calibration(cell.calibration.name, cell.seed)
        if not file.exists():
            entry = cell.calibration
            source = CalibrationSource(self._sources(entry), entry.windows, entry.length, entry.column)
            config = reference.model.config
            calibration_set(reference.tokenizer, config, source, seed=cell.seed, progress=told).save(file)
        recipe = self._recipe(cell, CalibrationSource(str(file)))
        return open_model(self.model, recipe, setup, progress=told)


def _with_axes(record: ResultRecord, cell: MatrixCell) -> ResultRecord:
    """Return a record whose subject says of which cell it is."""
    subject = record.subject.model_copy(update={"options": record.subject.options | cell.axes})
    found = cell_key(subject.scheme, subject.options)
    assert found == cell.key, f"a record of {found} was measured for {cell.key}"
    return record.model_copy(update={"subject": subject})


class _Clock:
    """How long cells take, and how long the rest of them will."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.last = time.monotonic()

    def tick(self) -> str:
        """One more is finished: return how long it took, and what is left at the mean pace."""
        now = time.monotonic()
        took, self.last = now - self.last, now
        self.done += 1
        left = self.total - self.done
        rest = f", about {(now - self.started) / self.done * left:.0f} s left" if left else ""
        return f"{self.done} of {self.total} cells finished, {took:.0f} s{rest}"
