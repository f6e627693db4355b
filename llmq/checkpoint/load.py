"""From a checkpoint to a model and its tokenizer; the weights are mapped, and never held twice.

The model is built on the meta device, and each parameter becomes the mapped tensor itself (`assign`). A tensor that has to
change (interleaved q and k rows, another dtype, joined shards) is copied alone, after which the mapping is let go, so the
pages of the file that were read for it do not stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmq.checkpoint.artefact import assemble, formats_by_parameter, stored_names
from llmq.checkpoint.complete import empty_model, parameter_shapes
from llmq.checkpoint.source import EMBEDDING, HEAD, Checkpoint
from llmq.checkpoint.verify import refuse_not_finite
from llmq.errors import CheckpointError, TokenizerError
from llmq.model.llama import Llama
from llmq.model.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llmq.numerics.grid import FloatGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, float_grid
from llmq.ops.tensor import QuantizedTensor
from llmq.progress import SILENT, Progress

_RELEASE_BYTES = 32 << 20
"""Mapped bytes that were read and copied before the mapping is let go."""


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    progress: Progress = SILENT,
) -> Llama:
    """Load a model, ready for inference (no gradients).

    Args:
        checkpoint: of `open_checkpoint`.
        dtype: float32, bfloat16 or float16, for every parameter that is not quantized; None: the checkpoint's own.
        device: where the parameters go.
        check_finite: refuse NaN and Inf; costs one pass over the weights.
        progress: told of each parameter.

    Returns:
        The model. Its linears have plain weights, or `QuantizedTensor` weights in the canonical layout for llmq's artefact.

    Raises:
        CheckpointError: a weight is not finite, or becomes infinite in `dtype`.
        UsageError: `dtype` is none of the three.
    """
    dtype = dtype or default_dtype(checkpoint)
    float_grid(dtype)  # refuses other dtypes
    model = empty_model(checkpoint.config)
    shapes = parameter_shapes(checkpoint.config)
    formats = formats_by_parameter(checkpoint.manifest) if checkpoint.manifest else {}
    reader = ParameterReader(checkpoint, dtype, torch.device(device), check_finite=check_finite)
    with progress.task("loading", total=len(shapes)) as advance:
        for name, shape in shapes.items():
            form = formats.get(name)
            value = reader.plain(name) if form is None else reader.quantized(name, shape, form)
            assign(model, name, value)
            advance(1)
    _tie(model, checkpoint, formats)
    checkpoint.release()
    return model.eval()


def load_tokenizer_for(checkpoint: Checkpoint, *, progress: Progress = SILENT) -> Tokenizer:
    """Load the tokenizer that lies beside a checkpoint's weights.

    A tokenizer with fewer tokens than the model has rows is usual (rows are padded to a round number), and is noted.

    Raises:
        TokenizerError: there is none, it cannot be read, or it has tokens that the model has no row for.
    """
    file = find_tokenizer(checkpoint.folder)
    if file is None:
        raise TokenizerError(
            f"checkpoint {checkpoint.path} has no tokenizer beside it; put the model's tokenizer.model or tokenizer.json into "
            f"{checkpoint.folder}."
        )
    tokenizer = load_tokenizer(file)
    rows = checkpoint.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"tokenizer {file} has {tokenizer.vocab_size} tokens, checkpoint {checkpoint.path} has {rows} rows; it is another "
            "model's: put the right one in its place."
        )
    if tokenizer.vocab_size < rows:
        progress.note(f"{file.name} has {tokenizer.vocab_size} tokens, the model {rows} rows: the rest is padding")
    return tokenizer


class ParameterReader:
    """Reads one parameter at a time in the wanted dtype, and checks it."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, check_finite: bool) -> None:
        self._checkpoint, self._dtype, self._device, self._check_finite = checkpoint, dtype, device, check_finite
        self._copied_bytes = 0

    def plain(self, name: str) -> Tensor:
        """A parameter that is stored as it is."""
        stored = self._checkpoint.read(name)
        tensor = stored.to(self._device, self._dtype).contiguous()
        if self._check_finite:
            refuse_not_finite(name, self._checkpoint.tensors[name].file, stored, cast=tensor)
        self._count(name, shared=stored.device == tensor.device and tensor.data_ptr() == stored.data_ptr())
        return tensor

    def quantized(self, name: str, shape: tuple[int, ...], form: LinearFormat) -> QuantizedTensor:
        """A weight of a linear for which the manifest has a format."""
        if isinstance(form.weight, FloatGrid):
            weight = self.plain(name)
            form = LinearFormat(float_grid(weight.dtype), form.activation)
            return QuantizedTensor.from_weight(QuantizedWeight.from_float(weight), form, self._dtype)
        tensors = {part: self._checkpoint.read(part).to(self._device) for part in stored_names(name, form)}
        if self._check_finite:
            for part, tensor in tensors.items():
                if tensor.is_floating_point():
                    refuse_not_finite(part, self._checkpoint.tensors[part].file, tensor)
        return QuantizedTensor.from_weight(assemble(name, form, shape, tensors), form, self._dtype)

    def _count(self, name: str, *, shared: bool) -> None:
        """Let go of the mapping after some copying. Tensors that share it keep it: then there was nothing to be gained."""
        if shared and not self._checkpoint.sources[name].copied:
            return
        self._copied_bytes += self._checkpoint.tensors[name].nbytes
        if self._copied_bytes >= _RELEASE_BYTES:
            self._checkpoint.release()
            self._copied_bytes = 0


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The checkpoint's own dtype; float64 is not computed in, and becomes float32."""
    return torch.float32 if checkpoint.dtype == torch.float64 else checkpoint.dtype


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter of that name; nothing is copied."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _tie(model: Llama, checkpoint: Checkpoint, formats: Mapping[str, LinearFormat]) -> None:
    """Give a tied head the embedding's memory; refuse a checkpoint that stores another head all the same."""
    if not checkpoint.config.tie_word_embeddings:
        return
    form = formats.get(HEAD)
    if form is not None:
        embedding = model.model.embed_tokens.weight.detach()
        form = LinearFormat(float_grid(embedding.dtype), form.activation)
        value = QuantizedTensor.from_weight(QuantizedWeight.from_float(embedding), form, embedding.dtype)
        model.lm_head.weight = nn.Parameter(value, requires_grad=False)
        return
    model.tie_weights()
    check_tied(checkpoint)


def check_tied(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose configuration ties the head to the embedding, and which stores another head all the same."""
    if not (checkpoint.config.tie_word_embeddings and HEAD in checkpoint.sources):
        return
    head, embedding = checkpoint.read(HEAD), checkpoint.read(EMBEDDING)
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise CheckpointError(
            f"tensor {HEAD} in {checkpoint.sources[HEAD].info.file} differs from {EMBEDDING}, though the configuration ties "
            "the two; set tie_word_embeddings to false to use both."
        )
