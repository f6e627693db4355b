"""One evaluation for everybody: the weights are put into llmq's float32 Llama, and compared with the original token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from llmq.calibration.corpus import TextSource
from llmq.checkpoint import load_model, open_checkpoint
from llmq.checkpoint.complete import parameter_shapes
from llmq.checkpoint.source import Checkpoint
from llmq.errors import InputError, TextError
from llmq.evaluation.divergence import CandidateResult, evaluate_candidate
from llmq.evaluation.protocols import PerplexityProtocol, Pieces, Window, prefix_token
from llmq.evaluation.reference import ReferenceLogits
from llmq.evaluation.scoring import LanguageModel
from llmq.model.llama import Llama
from llmq.model.runtime import choose_runtime
from llmq.model.tokenizer import Tokenizer
from llmq.ops.select import prepare
from llmq.progress import Progress
from llmq.schemes.apply import quantize_
from llmq.schemes.registry import resolve
from quality.exchange import WEIGHTS, is_handed_over


class BosWindows(PerplexityProtocol):
    """Windows that do not overlap, each of BOS and `length - 1` tokens of text; all of the text's tokens are scored."""

    name: ClassVar[str] = "bos-windows"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "windows that do not overlap, BOS before each, every token of the text scored"

    def cut(self, tokenizer: Tokenizer, text: TextSource) -> Pieces:
        """See `PerplexityProtocol.cut`."""
        bos, _ = prefix_token(tokenizer)
        tokens = torch.tensor(tokenizer.encode(text.joined(), bos=False))
        size = self.length - 1
        count = min(len(tokens) // size, self.limit or len(tokens))
        if count == 0:
            raise TextError(f"text {text.name} has {len(tokens)} tokens, too few for one window of {size}; choose a longer one.")
        start = torch.tensor([bos])
        windows = [Window(torch.cat([start, part[:-1]]), part, 0) for part in tokens[: count * size].view(count, size)]
        return Pieces(windows, "before each window, not scored", None)


class Evaluator:
    """The original model on one text, ready to be compared with; a context manager, for its temporary file."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, text: TextSource, limit: int | None) -> None:
        self.checkpoint, self.tokenizer, self.text = checkpoint, tokenizer, text
        self.protocol = BosWindows(length=min(256, checkpoint.config.max_position_embeddings), limit=limit)
        self.reference = ReferenceLogits(runner_of(self._original()), tokenizer, text, self.protocol)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.reference.close()

    def _original(self) -> Llama:
        return load_model(self.checkpoint, dtype=torch.float32)

    def weights(self, folder: Path, progress: Progress) -> CandidateResult:
        """Evaluate the weights that a maker left in `folder`.

        Raises:
            InputError: a parameter is missing, has another shape, or is not one that a tool may change.
        """
        model = self._original()
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            put_weights(model, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
        return self.model(runner_of(model), progress)

    def model(self, model: LanguageModel, progress: Progress) -> CandidateResult:
        """Evaluate a model that runs as it is: one that quantizes its activations."""
        return evaluate_candidate(model, self.tokenizer, self.text, self.protocol, reference=self.reference, progress=progress)


def runner_of(model: Llama) -> LanguageModel:
    """Return what runs a float32 model fastest: the native runtime where there is one, else torch."""
    quantize_(model, resolve("fp32"), dtype=torch.float32)
    prepare(model)
    return choose_runtime(model).runner


def put_weights(model: Llama, weights: dict[str, torch.Tensor]) -> None:
    """Put float weights of all blocks and norms into `model`; raises InputError when they are not exactly these."""
    expected = {name: shape for name, shape in parameter_shapes(model.config).items() if is_handed_over(name)}
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))
        raise InputError(
            f"the weights that were handed over are not the model's blocks and norms: {odd[0]} (and {len(odd) - 1} more)."
        )
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, weight in weights.items():
        if tuple(weight.shape) != tuple(expected[name]) or not bool(torch.isfinite(weight).all()):
            raise InputError(f"{name} was handed over with shape {tuple(weight.shape)}, or with numbers that are not finite.")
        parameters[name].data = weight


def open_original(model: str) -> Checkpoint:
    """Open the original; raises InputError when it is quantized already."""
    checkpoint = open_checkpoint(model)
    if checkpoint.manifest is not None:
        raise InputError(f"{model} is quantized already (scheme {checkpoint.manifest.scheme}); name the original checkpoint.")
    return checkpoint
