"""What `llmq inspect` says of a checkpoint, as plain data. Headers are read, weights are not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from llmq.checkpoint.artefact import formats_by_parameter, stored_names
from llmq.checkpoint.complete import parameter_shapes
from llmq.checkpoint.load import load_tokenizer_for
from llmq.checkpoint.source import EMBEDDING, HEAD, Checkpoint, Format
from llmq.errors import TokenizerError
from llmq.model.config import LlamaConfig
from llmq.numerics.grid import LinearFormat


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file of weights."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class DtypeFacts:
    """All stored tensors of one dtype; `elements` counts what is stored (packed codes: bytes)."""

    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The tokenizer beside the weights."""

    file: str
    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    sha256: str


@dataclass(frozen=True, slots=True)
class ParameterFacts:
    """One parameter of the model. `format` is None for one that is stored as it is; `nbytes` has scales and zero points."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    format: LinearFormat | None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of weights."""
        return 8 * self.nbytes / self.elements


@dataclass(frozen=True, slots=True)
class ArtefactFacts:
    """How llmq made it; see `Manifest` for each field."""

    scheme: str
    options: dict[str, Any]
    source: dict[str, Any]
    calibration: dict[str, Any] | None
    seed: int | None
    threads: int | None
    versions: dict[str, str]
    skipped: dict[str, str]
    layers: list[dict[str, Any]]
    tokenizer_matches: bool | None


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint, explained.

    Attributes:
        path: what was asked for.
        format: how it is stored.
        files: the files of weights.
        config: the model's shape.
        parameters: every parameter, in the model's order; a tied head is not among them.
        counts: number of weights by kind: embedding, attention, mlp, norm, bias, head.
        dtypes: what the stored tensors are in, the largest share first.
        tokenizer: None when there is none that can be used; `tokenizer_problem` then says why.
        tokenizer_problem: one sentence, or None.
        artefact: None unless llmq wrote it.
        notes: what was assumed, and what was left out.
    """

    path: str
    format: Format
    files: list[FileFacts]
    config: LlamaConfig
    parameters: list[ParameterFacts]
    counts: dict[str, int]
    dtypes: list[DtypeFacts]
    tokenizer: TokenizerFacts | None
    tokenizer_problem: str | None
    artefact: ArtefactFacts | None
    notes: tuple[str, ...]

    @property
    def total_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return sum(self.counts.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parameters: what the files hold but for their headers."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def file_bits_per_weight(self) -> float:
        """All stored bits over all weights, embeddings and norms included."""
        return 8 * self.stored_bytes / self.total_parameters

    @property
    def matrix_bits_per_weight(self) -> float:
        """The same over the quantized linears; over all linears where there is none."""
        linears = [parameter for parameter in self.parameters if parameter.kind in ("attention", "mlp", "head")]
        chosen = [row for row in linears if row.format is not None and row.format.quantized] or linears
        return 8 * sum(row.nbytes for row in chosen) / sum(row.elements for row in chosen)

    def to_json(self) -> dict[str, Any]:
        """Plain data, sums included."""
        data = asdict(self)
        for row, parameter in zip(data["parameters"], self.parameters, strict=True):
            row["format"] = parameter.format.to_json() if parameter.format else None
            row["bits_per_weight"] = parameter.bits_per_weight
        sums = ("total_parameters", "stored_bytes", "file_bits_per_weight", "matrix_bits_per_weight")
        return data | {name: getattr(self, name) for name in sums}


def describe(checkpoint: Checkpoint) -> Description:
    """Explain an opened checkpoint."""
    formats = formats_by_parameter(checkpoint.manifest) if checkpoint.manifest else {}
    parameters = []
    for name, shape in parameter_shapes(checkpoint.config).items():
        form = formats.get(name)
        stored = [checkpoint.tensors[part] for part in stored_names(name, form)]
        dtype = _dtype_name(stored[0].dtype)
        parameters.append(ParameterFacts(name, _kind(name), shape, dtype, sum(info.nbytes for info in stored), form))
    counts: dict[str, int] = {}
    for parameter in parameters:
        counts[parameter.kind] = counts.get(parameter.kind, 0) + parameter.elements
    tokenizer, problem = _tokenizer(checkpoint)
    return Description(
        path=str(checkpoint.path),
        format=checkpoint.format,
        files=[FileFacts(path.name, path.stat().st_size) for path in checkpoint.files],
        config=checkpoint.config,
        parameters=parameters,
        counts=counts,
        dtypes=_dtypes(checkpoint),
        tokenizer=tokenizer,
        tokenizer_problem=problem,
        artefact=_artefact(checkpoint, tokenizer),
        notes=checkpoint.notes,
    )


def _kind(name: str) -> str:
    if name == EMBEDDING:
        return "embedding"
    if name == HEAD:
        return "head"
    if name.endswith(".bias"):
        return "bias"
    if ".self_attn." in name:
        return "attention"
    return "mlp" if ".mlp." in name else "norm"


def _dtypes(checkpoint: Checkpoint) -> list[DtypeFacts]:
    sums: dict[str, list[int]] = {}
    for info in checkpoint.tensors.values():
        row = sums.setdefault(_dtype_name(info.dtype), [0, 0, 0])
        for index, value in enumerate((1, prod(info.shape), info.nbytes)):
            row[index] += value
    return sorted((DtypeFacts(dtype, *row) for dtype, row in sums.items()), key=lambda facts: -facts.nbytes)


def _tokenizer(checkpoint: Checkpoint) -> tuple[TokenizerFacts | None, str | None]:
    try:
        tokenizer = load_tokenizer_for(checkpoint)
    except TokenizerError as error:
        return None, str(error)
    ids = (tokenizer.bos_id, tokenizer.eos_id)
    return TokenizerFacts(tokenizer.path.name, tokenizer.kind, tokenizer.vocab_size, *ids, tokenizer.sha256), None


def _artefact(checkpoint: Checkpoint, tokenizer: TokenizerFacts | None) -> ArtefactFacts | None:
    manifest = checkpoint.manifest
    if manifest is None:
        return None
    recorded = manifest.tokenizer_sha256
    return ArtefactFacts(
        scheme=manifest.scheme,
        options=manifest.options,
        source=manifest.source,
        calibration=manifest.calibration,
        seed=manifest.seed,
        threads=manifest.threads,
        versions=manifest.versions,
        skipped=manifest.skipped,
        layers=manifest.layers,
        tokenizer_matches=recorded == tokenizer.sha256 if recorded and tokenizer else None,
    )


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
