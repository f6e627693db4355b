"""SensitivityTable: what quantizing each linear one way or another would cost the model, kept in a file for every later budget.

The file holds no times and no paths: the same measurement writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.calibration.sensitivity import METHODS, LinearSensitivity, Method
from llmq.errors import InputError, UsageError
from llmq.files import atomic_path, sha256_text
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.registry import resolve

KIND = "llmq-sensitivity"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SensitivityTable:
    """Predicted divergences in nats per token, and what they were predicted from.

    Attributes:
        model: name of the checkpoint.
        model_sha256: of its weights.
        method: how they were predicted; see `sensitivity`.
        calibration: where the windows come from, as a manifest has it.
        held_out: windows that the divergence was measured on, the last ones of the set; 0: none were.
        threads: that computed it; another number sums in another order.
        candidates: schemes with their options.
        linears: the predictions, in the model's order.
    """

    model: str
    model_sha256: str
    method: Method
    calibration: Mapping[str, Any]
    held_out: int
    threads: int
    candidates: tuple[ResolvedScheme, ...]
    linears: tuple[LinearSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "method": self.method,
            "calibration": dict(self.calibration),
            "held_out": self.held_out,
            "threads": self.threads,
            "candidates": [{"scheme": each.name, "options": each.options_json()} for each in self.candidates],
            "linears": {each.fqn: {"shape": list(each.shape), "kl": list(each.kl)} for each in self.linears},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SensitivityTable:
        """Inverse of `to_json`; KeyError, TypeError, ValueError or UsageError for anything else."""
        method = next(name for name in METHODS if name == data["method"])
        candidates = tuple(resolve(each["scheme"], each["options"]) for each in data["candidates"])
        linears = []
        for fqn, each in data["linears"].items():
            n, k = each["shape"]
            kl = tuple(None if value is None else float(value) for value in each["kl"])
            if len(kl) != len(candidates):
                raise ValueError(f"{fqn} has {len(kl)} values for {len(candidates)} candidates")
            linears.append(LinearSensitivity(fqn, (int(n), int(k)), kl))
        return cls(
            model=data["model"],
            model_sha256=data["model_sha256"],
            method=method,
            calibration=data["calibration"],
            held_out=int(data["held_out"]),
            threads=int(data["threads"]),
            candidates=candidates,
            linears=tuple(linears),
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's content."""
        return sha256_text(self._text())

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write it, whole or not at all; OutputError when `path` exists and `force` is not set."""
        with atomic_path(path, force=force) as temporary:
            temporary.write_text(self._text(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, *, model_sha256: str) -> SensitivityTable:
        """Read what `save` wrote.

        Raises:
            InputError: the file is no such table, or is of another model.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["kind"] != KIND or data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"kind {data['kind']!r}, schema version {data['schema_version']!r}")
            table = cls.from_json(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, UsageError) as error:
            raise InputError(f"{path} is not a table of sensitivities ({error}); make one with `llmq sensitivity`.") from error
        if table.model_sha256 != model_sha256:
            raise InputError(
                f"{path} was measured on another model ({table.model}, sha256 {table.model_sha256[:12]}…, this one is "
                f"{model_sha256[:12]}…); measure this one with `llmq sensitivity`."
            )
        return table

    def _text(self) -> str:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
