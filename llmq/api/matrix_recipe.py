"""The recipe of a matrix, a TOML file, and the cells that it means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmq.api.comparing import SpeedQuestion
from llmq.api.evaluating import Question
from llmq.results.toml_file import Settings, read_toml
from llmq.schemes.registry import ResolvedScheme, get_scheme, resolve

GROUP_SIZE = "group_size"
CALIBRATION, SEED = "calibration", "calibration_seed"
"""Under which names the axes stand among the options of a record's subject."""


class SchemeEntry(Settings):
    """A scheme, and those of its options that are the same in all its cells; its name alone will do."""

    name: str
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)


class CalibrationEntry(Settings):
    """A calibration set by a name; without sources it is of the default text."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sources: tuple[str, ...] = Field(default=(), description="as `--calibration` takes them, files beside the recipe")
    windows: int | None = Field(default=None, ge=1)
    length: int | None = Field(default=None, ge=8, description="tokens a window")
    column: str = "text"


class TextEntry(Settings):
    """What quality is measured on."""

    file: str | None = Field(default=None, description="beside the recipe; left out: the text that `llmq compare` takes")
    protocol: str = "windows"
    window: int | None = Field(default=None, ge=2)
    limit: int | None = Field(default=None, ge=1)


class BenchEntry(Settings):
    """How speed is measured; `bench = true` takes the defaults."""

    prompt_length: int | None = Field(default=None, ge=1)
    new_tokens: int | None = Field(default=None, ge=1)
    repeats: int = Field(default=5, ge=1)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _switched(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class MatrixRecipe(Settings):
    """Everything that is asked for. Paths that are not absolute begin at the recipe's folder."""

    model: str
    schemes: tuple[Annotated[SchemeEntry, BeforeValidator(_named)], ...] = Field(min_length=1)
    reference: Literal["bf16", "fp16", "fp32"] = "bf16"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    group_sizes: tuple[int | str, ...] = ()
    calibration: tuple[CalibrationEntry, ...] = Field(default=(CalibrationEntry(name="default"),), min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    text: TextEntry = TextEntry()
    bench: Annotated[BenchEntry | None, BeforeValidator(_switched)] = None
    skip: tuple[str, ...] = ()
    skip_unfit: bool = False
    lm_head: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> MatrixRecipe:
        axes: dict[str, Sequence[Any]] = {
            "schemes": [(entry.name, sorted(entry.options.items())) for entry in self.schemes],
            "group_sizes": self.group_sizes,
            "calibration": [entry.name for entry in self.calibration],
            "seeds": self.seeds,
        }
        for axis, values in axes.items():
            for value in values:
                if list(values).count(value) > 1:
                    raise ValueError(f"{axis} names {value[0] if isinstance(value, tuple) else value} twice; name it once")
        return self

    def question(self, folder: Path) -> Question:
        """What is asked of a model's quality; files are looked for in `folder`."""
        text = self.text
        return Question(None if text.file is None else str(folder / text.file), text.protocol, text.window, text.limit)

    def speed(self) -> SpeedQuestion | None:
        """What is asked of its speed; None: nothing."""
        return None if self.bench is None else SpeedQuestion(self.bench.prompt_length, self.bench.new_tokens, self.bench.repeats)


@dataclass(frozen=True)
class MatrixCell:
    """One model to measure: a scheme with its options and, where it is calibrated, a calibration set and a seed."""

    resolved: ResolvedScheme
    calibration: CalibrationEntry | None = None
    seed: int | None = None

    @property
    def axes(self) -> dict[str, Any]:
        """What the options of its records say beside those of the scheme."""
        return {} if self.calibration is None else {CALIBRATION: self.calibration.name, SEED: self.seed}

    @property
    def key(self) -> str:
        """What tells it from other cells, and finds its records."""
        return cell_key(self.resolved.name, {**self.resolved.options_json(), **self.axes})

    @property
    def label(self) -> str:
        """How it is called while it is measured."""
        size = self.resolved.options_json().get(GROUP_SIZE)
        named = {GROUP_SIZE: size, CALIBRATION: self.axes.get(CALIBRATION), "seed": self.seed}
        return " ".join([self.resolved.name, *(f"{name}={value}" for name, value in named.items() if value is not None)])


@dataclass(frozen=True)
class Cells:
    """The distinct cells, the reference first, and how many combinations of the axes there are."""

    cells: tuple[MatrixCell, ...]
    combinations: int


def cell_key(scheme: str, options: dict[str, Any]) -> str:
    """Return what tells a cell from others: of its scheme and of what its records say of their options."""
    return json.dumps([scheme, options], sort_keys=True)


def read_recipe(path: Path) -> MatrixRecipe:
    """Read a recipe.

    Raises:
        InputError: it cannot be read, or a key or a value is not allowed.
    """
    return read_toml(path, MatrixRecipe, "recipe")


def cells_of(recipe: MatrixRecipe) -> Cells:
    """Return every distinct cell: a scheme without group sizes, or one without data, does not multiply by what it ignores.

    Raises:
        UsageError: a scheme or an option is unknown, or a value is not allowed.
    """
    found: dict[str, MatrixCell] = {}
    reference = MatrixCell(resolve(recipe.reference))
    found[reference.key] = reference
    axes = (recipe.schemes, recipe.group_sizes or (None,), recipe.calibration, recipe.seeds)
    combinations = list(product(*axes))
    for entry, group_size, calibration, seed in combinations:
        cell = _cell(entry, group_size, calibration, seed)
        found.setdefault(cell.key, cell)
    return Cells(tuple(found.values()), len(combinations))


def _cell(entry: SchemeEntry, group_size: int | str | None, calibration: CalibrationEntry, seed: int) -> MatrixCell:
    options: dict[str, Any] = dict(entry.options)
    if group_size is not None and GROUP_SIZE not in options and GROUP_SIZE in get_scheme(entry.name).Options.model_fields:
        options[GROUP_SIZE] = group_size
    resolved = resolve(entry.name, options)
    return MatrixCell(resolved, calibration, seed) if resolved.needs_calibration else MatrixCell(resolved)
