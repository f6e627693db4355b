"""Per-token losses: what every later paired comparison needs, small enough to keep with every evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.errors import InputError, UsageError
from llmq.evaluation.estimates import Estimate, batch_means
from llmq.files import atomic_path
from llmq.results import record

_FORMAT = "llmq-token-losses"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """The loss of every scored token of one evaluation, in order, and what they are losses of."""

    nll: Tensor
    """float32 [n], -ln p in nats, on the CPU."""
    window_sizes: Tensor
    """int32 [W]: scored tokens of each window, consecutive in `nll`."""
    protocol: record.Protocol
    text: str
    """Name of the text."""
    text_sha256: str
    tokenizer_sha256: str
    dtype: str
    """Dtype of the logits that the losses come from, such as 'bfloat16'."""
    subject: str = ""
    """Whose losses they are; for the reader only."""

    @property
    def window_ids(self) -> Tensor:
        """Int64 [n]: the window of every scored token, from 0."""
        return torch.repeat_interleave(torch.arange(self.window_sizes.numel()), self.window_sizes.long())

    def total(self) -> float:
        """Sum of all losses, in nats, summed in double precision."""
        return float(self.nll.double().sum())


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much worse `b` is than `a`, token by token on the same text."""

    delta_ln_perplexity: Estimate
    """Mean of nll_b - nll_a in nats/token, which is ln(ppl_b / ppl_a); standard error by batch means over windows."""
    identical: bool
    """Every loss is bit for bit the same."""
    n_tokens: int


def paired_difference(a: TokenLosses, b: TokenLosses) -> PairedDifference:
    """Compare two evaluations token by token; what both find hard cancels, so that small differences show.

    Raises:
        UsageError: the two are not of the same protocol, text and tokenizer; names what differs.
    """
    for what, left, right in (
        ("protocol", a.protocol.name, b.protocol.name),
        ("protocol version", a.protocol.version, b.protocol.version),
        *(
            (f"protocol parameter {key!r}", a.protocol.params.get(key), b.protocol.params.get(key))
            for key in sorted({*a.protocol.params, *b.protocol.params})
        ),
        ("text_sha256", a.text_sha256, b.text_sha256),
        ("tokenizer_sha256", a.tokenizer_sha256, b.tokenizer_sha256),
        ("scored tokens", a.nll.numel(), b.nll.numel()),
    ):
        if left != right:
            raise UsageError(
                f"these results cannot be compared: {what} is {left!r} in one and {right!r} in the other; evaluate both alike."
            )
    if not torch.equal(a.window_sizes, b.window_sizes):
        raise UsageError("these results cannot be compared: their windows hold different numbers of tokens; evaluate both alike.")
    return PairedDifference(
        delta_ln_perplexity=batch_means(b.nll.double() - a.nll.double(), a.window_sizes),
        identical=torch.equal(a.nll, b.nll),
        n_tokens=a.nll.numel(),
    )


def save_losses(losses: TokenLosses, path: Path, *, force: bool = False) -> None:
    """Write one safetensors file with its description as JSON metadata, whole or not at all.

    Raises:
        OutputError: `path` exists and `force` is not set, or it cannot be written.
    """
    description = {
        "version": _VERSION,
        "protocol": losses.protocol.model_dump(),
        "text": losses.text,
        "text_sha256": losses.text_sha256,
        "tokenizer_sha256": losses.tokenizer_sha256,
        "dtype": losses.dtype,
        "subject": losses.subject,
    }
    tensors = {"nll": losses.nll.contiguous(), "window_sizes": losses.window_sizes.contiguous()}
    with atomic_path(path, force=force) as temporary:
        save_file(tensors, temporary, metadata={_FORMAT: json.dumps(description, sort_keys=True)})


def load_losses(path: Path) -> TokenLosses:
    """Read what `save_losses` wrote.

    Raises:
        InputError: the file is missing, damaged, of another kind, or of a newer version.
    """
    if not path.is_file():
        raise InputError(f"losses file {path} does not exist; `llmq eval perplexity --losses FILE` writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _FORMAT not in metadata:
                raise InputError(f"{path} holds no per-token losses; name a file that `llmq eval perplexity --losses` wrote.")
            description: dict[str, Any] = json.loads(metadata[_FORMAT])
            nll, window_sizes = file.get_tensor("nll"), file.get_tensor("window_sizes")
        version = description.pop("version")
        if version != _VERSION:
            raise InputError(
                f"{path} has version {version} of the losses format, this llmq reads {_VERSION}; use the llmq that wrote it."
            )
        description["protocol"] = record.Protocol.model_validate(description["protocol"])
        losses = TokenLosses(nll=nll, window_sizes=window_sizes, **description)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(
            f"losses file {path} is damaged ({error}); write it again with `llmq eval perplexity --losses`."
        ) from error
    if losses.nll.dtype != torch.float32 or int(losses.window_sizes.sum()) != losses.nll.numel():
        raise InputError(
            f"losses file {path} is damaged: {losses.nll.numel()} losses for windows of {int(losses.window_sizes.sum())} tokens."
        )
    return losses
