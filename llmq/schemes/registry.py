"""The schemes by name. Every file of this folder that defines `SCHEMES` is found when the first name is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

import llmq.schemes
from llmq.errors import UsageError, suggest
from llmq.schemes.base import ResolvedScheme, Scheme, SchemeOptions

__all__ = ["ResolvedScheme", "Scheme", "describe_schemes", "get_scheme", "resolve", "scheme_names"]


@cache
def _schemes() -> dict[str, Scheme[Any]]:
    found: dict[str, Scheme[Any]] = {}
    for module in sorted(pkgutil.iter_modules(llmq.schemes.__path__), key=lambda module: module.name):
        loaded = importlib.import_module(f"{llmq.schemes.__name__}.{module.name}")
        for scheme in getattr(loaded, "SCHEMES", ()):
            if scheme.name in found:
                raise UsageError(f"two schemes are called {scheme.name!r}; the second is in {loaded.__name__}: rename one.")
            found[scheme.name] = scheme
    return found


def scheme_names() -> list[str]:
    """Return the names of all schemes: baselines first, then by name."""
    return sorted(_schemes(), key=lambda name: (_schemes()[name].baseline_dtype is None, name))


def get_scheme(name: str) -> Scheme[Any]:
    """Return the scheme of that name; raises UsageError, with the nearest name, when there is none."""
    if name not in _schemes():
        raise UsageError(f"unknown scheme {name!r}.{suggest(name, scheme_names())}")
    return _schemes()[name]


def resolve(name: str, options: Mapping[str, Any] | None = None) -> ResolvedScheme:
    """Find a scheme and settle its options.

    Args:
        name: of the scheme.
        options: values by option, as such or as text ({'group_size': '64'}); what is missing takes its default.

    Raises:
        UsageError: the name or an option is unknown, or a value is not allowed.
    """
    scheme = get_scheme(name)
    known = list(scheme.Options.model_fields)
    for key in options or {}:
        if key not in known:
            hint = suggest(key, known) if known else " It has no options."
            raise UsageError(f"scheme {name} has no option {key!r}.{hint}")
    try:
        return ResolvedScheme(scheme, scheme.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # the options contradict each other, and the message says how
            raise UsageError(f"options of scheme {name}: {message}.") from error
        message = message.replace("Input should be", "must be")
        raise UsageError(f"option {problem['loc'][0]} of scheme {name} {message}, got {problem['input']!r}.") from error


def describe_schemes(name: str | None = None) -> list[dict[str, Any]]:
    """Describe every scheme, or one, as plain data: name, summary, needs_calibration, bits_per_weight, options.

    `bits_per_weight` is that of 4096 inputs with the default options. Each option has name, type, default, unit (or None)
    and description.
    """
    schemes = [get_scheme(name)] if name is not None else [get_scheme(each) for each in scheme_names()]
    return [
        {
            "name": scheme.name,
            "summary": scheme.summary,
            "needs_calibration": scheme.needs(scheme.Options()).calibration,
            "bits_per_weight": scheme.format(scheme.Options()).weight.bits_per_weight(4096),
            "options": _describe_options(scheme.Options),
        }
        for scheme in schemes
    ]


def _describe_options(options: type[SchemeOptions]) -> list[dict[str, Any]]:
    described = []
    properties = options.model_json_schema()["properties"] if options.model_fields else {}
    for name, field in options.model_fields.items():
        schema = properties[name]
        kind = " | ".join(map(str, schema["enum"])) if "enum" in schema else schema["type"]
        extra = field.json_schema_extra
        unit = extra.get("unit") if isinstance(extra, dict) else None
        described.append({"name": name, "type": kind, "default": field.default, "unit": unit, "description": field.description})
    return described
