"""llmq.json: what an artefact says of itself: how it was made, from what, and what its files hold.

There is no time and no place in it: the same inputs, seed and threads make the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmq.errors import CheckpointError, UsageError
from llmq.numerics.grid import LinearFormat, ScaleDtype, format_from_json

SCHEMA_VERSION = 2
KIND: Literal["llmq-checkpoint"] = "llmq-checkpoint"
FILE_NAME = "llmq.json"


class StoredFile(BaseModel):
    """One file of weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    nbytes: int


class Manifest(BaseModel):
    """What llmq.json holds. The caller says how the model was made; `save_model` fills in what it stores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["llmq-checkpoint"] = KIND
    schema_version: int = SCHEMA_VERSION
    scheme: str
    options: dict[str, Any] = Field(default_factory=dict, description="every option of the scheme, resolved")
    overrides: list[dict[str, Any]] = Field(
        default_factory=list, description="other schemes of some linears: pattern, scheme, options"
    )
    allocation: dict[str, Any] | None = Field(None, description="the budget that overrides were solved for, and from what")
    rotation: dict[str, Any] | None = Field(None, description="which rotations the weights were multiplied with; None: none")
    source: dict[str, Any] = Field(default_factory=dict, description="of the original checkpoint: name, format, sha256 …")
    calibration: dict[str, Any] | None = Field(None, description="text, hashes, windows, length, seed; None: none was used")
    tokenizer_sha256: str | None = None
    seed: int | None = None
    threads: int | None = None
    device: str | None = Field(None, description="what it was quantized on: cpu, or cuda and the name of the GPU")
    versions: dict[str, str] = Field(default_factory=dict, description="package -> version")
    skipped: dict[str, str] = Field(default_factory=dict, description="linear that was not quantized -> why")
    layers: list[dict[str, Any]] = Field(default_factory=list, description="a report for each quantized linear")

    distillation: dict[str, Any] | None = Field(None, description="how the whole model was distilled; None: it was not")

    dtype: ScaleDtype | None = Field(None, description="compute dtype; filled in by save_model")
    formats: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="linear -> LinearFormat.to_json() of its weight; filled in by save_model"
    )
    weights: dict[str, StoredFile] = Field(default_factory=dict, description="file -> hash and size; filled in by save_model")

    def linear_formats(self) -> dict[str, LinearFormat]:
        """Return the format of each linear, by its fqn."""
        return {fqn: format_from_json(data) for fqn, data in self.formats.items()}

    def write(self, path: Path) -> None:
        """Write it; equal manifests make equal bytes."""
        data = self.model_dump(mode="json")
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def parse_manifest(path: Path, data: dict[str, Any]) -> Manifest:
    """Read the content of an llmq.json.

    Raises:
        CheckpointError: it was written by a newer llmq, is incomplete, or has a value that cannot be.
    """
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, this llmq reads up to {SCHEMA_VERSION}; update llmq (pip install -U llmq)."
        )
    try:
        manifest = Manifest.model_validate(data)
        manifest.linear_formats()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{path} is not a valid manifest: {where}: {first['msg']}; quantize the original again.") from error
    except (KeyError, TypeError, UsageError) as error:
        raise CheckpointError(f"{path} is not a valid manifest: formats: {error}; quantize the original again.") from error
    if manifest.dtype is None or not manifest.weights:
        missing = "dtype" if manifest.dtype is None else "weights"
        raise CheckpointError(f"{path} is not a valid manifest: {missing} is missing; quantize the original again.")
    return manifest
