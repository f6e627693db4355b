"""Settings in TOML files, read strictly: an unknown key is an error that suggests the nearest known one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from llmq.errors import InputError, suggest


class Settings(BaseModel):
    """Base of everything that a TOML file may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Settings = TypeVar("_Settings", bound=Settings)


def read_toml(path: Path, kind: type[_Settings], what: str) -> _Settings:
    """Read a TOML file as `kind`; `what` ('tolerances') begins the message of any error.

    Raises:
        InputError: the file cannot be read, is not TOML, or holds an unknown key or a value that is not allowed.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 (byte {error.start})"
        raise InputError(f"cannot read {what} from {path}: {reason}; name a TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} {path} is not TOML: {error}; mend that line.") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{what} {path}: {_first_problem(error, kind)}") from error


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    problems = error.errors()
    # a misspelt key is missing too: say the one thing that mends both
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part + 1) if isinstance(part, int) else part for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _model_at(kind, problem["loc"][:-1])
        return f"unknown key {where}.{suggest(str(problem['loc'][-1]), list(known.model_fields))}"
    if problem["type"] == "missing":
        return f"{where} is missing; add it."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not problem["loc"] or isinstance(problem["input"], dict):  # keys that contradict each other: the message says how
        return f"{where + ': ' if where else ''}{message}."
    return f"{where} {message}, got {problem['input']!r}."


def _model_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model that holds the keys at `location`; positions in a list lead nowhere deeper."""
    for part in location:
        if isinstance(part, str):
            kind = _model_in(kind.model_fields[part].annotation)
    return kind


def _model_in(annotation: Any) -> type[BaseModel]:
    """Return the model that an annotation names: itself, or inside of a tuple, list or union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(found for argument in get_args(annotation) if (found := _model_in(argument)))
