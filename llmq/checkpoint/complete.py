"""Do the stored tensors make the model that the configuration describes? Decided by names, shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmq.checkpoint.source import HEAD, TensorInfo, TensorSource, refuse_quantized
from llmq.errors import CheckpointError
from llmq.model.config import LlamaConfig
from llmq.model.llama import Llama

_SHOWN = 3
"""How many names a message lists."""

_COMPUTED = "rotary_emb.inv_freq"
"""Stored by old versions of transformers; llmq computes it from the configuration."""


class _Uninitialized(TorchFunctionMode):
    """Leaves new parameters as they are: on the meta device torch would import its compiler (a second) to fill nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.fill_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: LlamaConfig) -> Llama:
    """Return the model on the meta device: shapes, and no memory."""
    with torch.device("meta"), _Uninitialized():
        return Llama(config)


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter, in the model's order; a tied head is not among them."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in empty_model(config).state_dict().items()
        if not (config.tie_word_embeddings and name == HEAD)
    }


def check_complete(
    config: LlamaConfig, sources: Mapping[str, TensorSource], config_file: Path, files: list[Path], *, ignored: Iterable[str] = ()
) -> dict[str, TensorInfo]:
    """Return what is known of each tensor, in the model's order.

    Args:
        config: the model's shape.
        sources: what is stored.
        config_file: where `config` came from, for messages.
        files: the files of weights, for messages.
        ignored: names that may be stored though no parameter has them.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape, or quantized.
    """
    expected = parameter_shapes(config)
    missing = [name for name in expected if name not in sources]
    if missing:
        raise CheckpointError(_missing(missing, config_file, files))
    allowed = {*expected, *ignored, *([HEAD] if config.tie_word_embeddings else [])}
    extra = [name for name in sources if name not in allowed and not name.endswith(_COMPUTED)]
    if extra:
        raise CheckpointError(
            f"{_listed(extra)} in {sources[extra[0]].info.file} {_is(extra)} not part of the model that {config_file} describes; "
            "the configuration is another model's, or the architecture is not one that llmq knows."
        )
    tensors = {name: sources[name].info for name in expected}
    for name, info in tensors.items():
        if info.shape != expected[name]:
            raise CheckpointError(
                f"tensor {name} in {info.file} has shape {list(info.shape)}, {config_file} asks for {list(expected[name])}; "
                "the two do not belong together."
            )
        refuse_quantized(name, info)
    return tensors


def _missing(names: list[str], config_file: Path, files: list[Path]) -> str:
    where = files[0] if len(files) == 1 else f"the {len(files)} files of {files[0].parent}"
    if names == [HEAD]:
        return f"tensor {HEAD} is missing in {where}; if the model's head is its embedding, {config_file} must say so."
    return (
        f"{_listed(names)} {_is(names)} missing in {where}; {config_file} asks for {_it(names)}, get the checkpoint again whole."
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    if len(names) == 1:
        return f"tensor {shown}"
    return f"tensors {shown}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
