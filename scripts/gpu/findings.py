"""What one run of scripts/gpu_check.py finds: rows of one table, which are records too.

Records are written without pydantic, which a GPU machine may lack; a test reads them as `llmq.results.record` does.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llmq.errors import UsageError
from llmq.files import atomic_path
from llmq.results.environment import facts

SCHEMA_VERSION = 3
"""Of the records; a test holds it equal to `llmq.results.record`."""
KINDS = {
    "verify": "kernel",
    "walls": "bandwidth",
    "kernels": "kernel",
    "model": "decode",
    "block": "quantize",
    "quantize": "quantize",
}
"""Part of the run -> kind of its records."""


@dataclass(frozen=True)
class Finding:
    """One row.

    Attributes:
        part: of the run; one of `KINDS`.
        what: the subject, such as 'int4, 4096 x 11008, 1 row'.
        who: kernel, runtime or method.
        value: the figure.
        unit: of it; '' for a row that only says whether something held.
        wall: the ceiling that it is a share of: 'copy' or 'bf16' …; '' for none.
        share: of that ceiling.
        wrong: what is wrong; '' where nothing is.
        note: what a reader has to know.
        more: further figures, (value, unit) by name.
    """

    part: str
    what: str
    who: str
    value: float = 0.0
    unit: str = ""
    wall: str = ""
    share: float | None = None
    wrong: str = ""
    note: str = ""
    more: dict[str, tuple[float, str]] = field(default_factory=dict)


def environment(device: str) -> dict[str, Any]:
    """Return where this runs, as records say it; CUDA and Triton are among the packages, and the memory is the GPU's."""
    gpu = device == "cuda"
    where = facts(torch.get_num_threads(), f"cuda ({torch.cuda.get_device_name()})" if gpu else device)
    more = {"cuda": torch.version.cuda} if gpu else {}
    with suppress(PackageNotFoundError):
        more["triton"] = version("triton")
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    return where | {"packages": where["packages"] | more, "memory_bytes": memory}


def record_of(finding: Finding, where: dict[str, Any]) -> dict[str, Any]:
    """Return a finding as a record."""
    metrics = {} if not finding.unit else {"value": _metric(finding.value, finding.unit)}
    if finding.share is not None:
        metrics["share"] = _metric(finding.share, "1")
    metrics |= {name: _metric(value, unit) for name, (value, unit) in finding.more.items()}
    notes = [text for text in (finding.wrong, finding.note) if text]
    return {
        "schema_version": SCHEMA_VERSION,
        "id": uuid.uuid4().hex,
        "created_at": datetime.now(UTC).isoformat(),
        "kind": KINDS[finding.part],
        "subject": {
            "model": finding.what,
            "checkpoint_sha256": "random",
            "scheme": finding.who,
            "options": {"part": finding.part, "wall": finding.wall, "wrong": finding.wrong},
        },
        "protocol": {"name": "gpu-check", "version": 1, "params": {"part": finding.part}},
        "metrics": metrics,
        "environment": where,
        "notes": notes,
    }


def write_records(path: Path, findings: Sequence[Finding], device: str, *, force: bool = False) -> None:
    """Write a record a line; raises OutputError when the file is there and `force` is not given."""
    where = environment(device)
    with atomic_path(path, force=force) as temporary:
        temporary.write_text("".join(json.dumps(record_of(each, where)) + "\n" for each in findings), encoding="utf-8")


def read_findings(path: Path) -> tuple[list[Finding], dict[str, Any]]:
    """Return the findings of a file of records, and where they were found; raises UsageError when there are none."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not records:
        raise UsageError(f"{path} holds no records; run scripts/gpu_check.py with --out {path} first.")
    return [_finding(record) for record in records], records[0]["environment"]


def _finding(record: dict[str, Any]) -> Finding:
    metrics, options = dict(record["metrics"]), record["subject"]["options"]
    value, share = metrics.pop("value", None), metrics.pop("share", None)
    wrong = options["wrong"]
    return Finding(
        part=options["part"],
        what=record["subject"]["model"],
        who=record["subject"]["scheme"],
        value=value["value"] if value else 0.0,
        unit=value["unit"] if value else "",
        wall=options["wall"],
        share=share["value"] if share else None,
        wrong=wrong,
        note=next((note for note in record["notes"] if note != wrong), ""),
        more={name: (metric["value"], metric["unit"]) for name, metric in metrics.items()},
    )


def _metric(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit}


def say(text: str) -> None:
    """Tell what happens, without buffering: a run on a machine that is lent may be cut."""
    print(text, file=sys.stderr, flush=True)
