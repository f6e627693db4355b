"""The recipe of `llmq ci`: what is measured, in a TOML file that lies beside the code that it guards."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmq.errors import InputError, suggest
from llmq.results.toml_file import Settings, read_toml

BUNDLED = "bundled"
"""Names llmq's own text, and with a colon and a name (`bundled:wt2-8m`) its own checkpoint."""
_TEXTS: dict[str, str] = {"test": "evaluation.txt", "train": "calibration.txt"}

Phase = Literal["decode", "prefill"]


class SchemeEntry(Settings):
    """One scheme. `id` tells it from others of its name; left out, it is the name."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return {"id": data["name"], **data} if isinstance(data, dict) and "name" in data else data


class TextEntry(Settings):
    """What is scored, and how; see `llmq eval perplexity`."""

    file: str = BUNDLED
    protocol: str = "windows"
    window: int | None = Field(default=None, ge=2)
    limit: int | None = Field(default=None, ge=2, description="windows; two at least, as errors need them")


class CalibrationEntry(Settings):
    """What is calibrated on."""

    file: str = BUNDLED
    windows: int = Field(default=128, ge=1)
    length: int | None = Field(default=None, ge=8)


class SpeedPair(Settings):
    """A scheme whose speed is judged as a ratio to another's, both measured in the same rounds."""

    candidate: str
    against: str
    phase: Phase = "decode"
    min_ratio: float | None = Field(default=None, gt=0, description="demanded; None: the baseline's, on the same machine")


class SpeedEntry(Settings):
    """What of speed is measured."""

    pair: tuple[SpeedPair, ...] = Field(min_length=1)
    prompt_length: int | None = Field(default=None, ge=1)
    new_tokens: int | None = Field(default=None, ge=1)
    repeats: int = Field(default=31, ge=2)
    attempts: int = Field(default=3, ge=1, description="a failure counts when so many measurements in a row fail")


class GateRecipe(Settings):
    """A file of `llmq ci`. Paths are relative to it."""

    model: str
    baseline: str
    tolerances: str | None = None
    reference: Literal["bf16", "fp16", "fp32"] = "bf16"
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    kv_cache: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    text: TextEntry = TextEntry()
    calibration: CalibrationEntry = CalibrationEntry()
    scheme: tuple[SchemeEntry, ...] = Field(min_length=1)
    speed: SpeedEntry | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [entry.id for entry in self.scheme]
        for twice in {name for name in ids if ids.count(name) > 1}:
            raise ValueError(f"two schemes have the id {twice!r}; give one of them an id of its own")
        for pair in self.speed.pair if self.speed else ():
            for name in (pair.candidate, pair.against):
                if name not in ids:
                    raise ValueError(f"a speed pair names the scheme {name!r}, which is not there.{suggest(name, ids)[:-1]}")
        return self


class GatePaths(Settings):
    """The paths of a recipe, found."""

    model: Path
    baseline: Path
    tolerances: Path | None
    text: Path
    calibration: Path


def read_recipe(path: Path) -> tuple[GateRecipe, GatePaths]:
    """Read a recipe and find what it names.

    Raises:
        InputError: the file is missing or wrong, or names a model or text that is not there.
    """
    recipe = read_toml(path, GateRecipe, "recipe")
    here = path.parent
    paths = GatePaths(
        model=_model(recipe.model, here),
        baseline=_beside(here, recipe.baseline),
        tolerances=None if recipe.tolerances is None else _beside(here, recipe.tolerances),
        text=_text(recipe.text.file, here, "test"),
        calibration=_text(recipe.calibration.file, here, "train"),
    )
    for what, found in (("model", paths.model), ("text", paths.text), ("calibration text", paths.calibration)):
        if not found.exists():
            raise InputError(f"recipe {path}: the {what} {found} does not exist; paths are relative to the recipe.")
    return recipe, paths


def _beside(here: Path, named: str) -> Path:
    """Return a path relative to a folder without the detour through it, as it is shown in reports."""
    return Path(os.path.normpath(here / named))


def _model(named: str, here: Path) -> Path:
    prefix, colon, name = named.partition(":")
    return Path(str(files("llmq") / "assets" / name)) if colon and prefix == BUNDLED else _beside(here, named)


def _text(named: str, here: Path, split: str) -> Path:
    return Path(str(files("llmq") / "assets" / "sample" / _TEXTS[split])) if named == BUNDLED else _beside(here, named)
