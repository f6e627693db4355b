"""Overrides: linears of a model that get another scheme, or other options, than the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from llmq.errors import UsageError, suggest
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.registry import resolve

FORM = "PATTERN=SCHEME[:KEY=VALUE,KEY=VALUE]"
EXAMPLE = "*.down_proj=int4:group_size=32"


@dataclass(frozen=True)
class Override:
    """Linears whose names match a shell pattern are quantized with this scheme.

    Attributes:
        pattern: of whole names, such as `*.down_proj` or `model.layers.0.*`.
        scheme: its name.
        options: of that scheme, as values or as text; what is missing takes that scheme's own default, whatever the options of
            the rest of the model are.
    """

    pattern: str
    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read 'PATTERN=SCHEME[:KEY=VALUE,KEY=VALUE]', as the command line gives it.

        Raises:
            UsageError: the text has another form, or names an option twice; `resolve` checks the scheme and its options.
        """
        pattern, equals, rest = text.partition("=")
        scheme, colon, pairs = rest.partition(":")
        if not (equals and pattern.strip() and scheme.strip()) or (colon and not pairs.strip()):
            raise UsageError(f"an override is {FORM}, such as {EXAMPLE!r}; got {text!r}.")
        options: dict[str, str] = {}
        for pair in pairs.split(",") if colon else ():
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not (key and equals and value):
                raise UsageError(f"an override is {FORM}, such as {EXAMPLE!r}; {pair!r} in {text!r} is not KEY=VALUE.")
            if key in options:
                raise UsageError(f"override {text!r} gives {key} twice ({options[key]} and {value}); give it once.")
            options[key] = value
        return cls(pattern.strip(), scheme.strip(), options)

    def __str__(self) -> str:
        """Return the text that `parse` reads, without options that have their defaults."""
        resolved = self.resolve()
        fields = type(resolved.options).model_fields
        changed = {key: value for key, value in resolved.options_json().items() if value != fields[key].default}
        pairs = ",".join(f"{key}={_text(value)}" for key, value in changed.items())
        return f"{self.pattern}={self.scheme}{':' if pairs else ''}{pairs}"

    def matches(self, fqn: str) -> bool:
        """Return whether a linear is meant."""
        return fnmatchcase(fqn, self.pattern)

    def resolve(self) -> ResolvedScheme:
        """Settle the scheme and its options.

        Raises:
            UsageError: the scheme or an option is unknown, a value is not allowed, or the scheme is a baseline, which casts a
                whole model.
        """
        resolved = resolve(self.scheme, self.options)
        if resolved.baseline_dtype is not None:
            raise UsageError(
                f"override {self.pattern}={self.scheme} names a baseline, which casts a whole model; leave linears unquantized "
                f"with --skip '{self.pattern}'."
            )
        return resolved

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest, with every option that applies; `Override(**data)` reads it back."""
        return {"pattern": self.pattern, "scheme": self.scheme, "options": self.resolve().options_json()}


def assign_overrides(
    overrides: Sequence[Override], fqns: Iterable[str], *, skip: Sequence[str] = ()
) -> dict[str, ResolvedScheme]:
    """Say which linears get which scheme instead of the model's.

    Several overrides may match a linear when they ask for the very same.

    Args:
        overrides: in any order: none is stronger than another.
        fqns: names of the linears that may be quantized.
        skip: patterns of linears that the user wants left alone.

    Returns:
        The resolved scheme by fqn, in the order of `fqns`, of the linears that an override matches.

    Raises:
        UsageError: a pattern matches no linear, two overrides ask for different things of one linear, a linear is to be
            skipped and overridden, or an override's scheme or options cannot be.
    """
    names = list(fqns)
    settled = [(override, override.resolve()) for override in overrides]
    for override, _ in settled:
        if not any(override.matches(fqn) for fqn in names):
            kinds = sorted({fqn.rsplit(".", 1)[-1] for fqn in names})
            raise UsageError(
                f"--override pattern {override.pattern!r} matches no linear; patterns are matched against whole names such as "
                f"{names[0] if names else 'model.layers.0.self_attn.q_proj'!r}.{suggest(override.pattern, kinds)}"
            )
    assigned: dict[str, ResolvedScheme] = {}
    for fqn in names:
        found = [(override, resolved) for override, resolved in settled if override.matches(fqn)]
        for override, resolved in found[1:]:
            if resolved != found[0][1]:
                raise UsageError(
                    f"overrides {str(found[0][0])!r} and {str(override)!r} ask for different things of {fqn}; narrow one pattern."
                )
        if not found:
            continue
        unwanted = next((pattern for pattern in skip if fnmatchcase(fqn, pattern)), None)
        if unwanted is not None:
            raise UsageError(
                f"{fqn} is to be left alone by --skip {unwanted!r} and quantized by --override {str(found[0][0])!r}; "
                "narrow one pattern."
            )
        assigned[fqn] = found[0][1]
    return assigned


def _text(value: object) -> str:
    """Write an option's value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
