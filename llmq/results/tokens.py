"""TokenFigures: what was measured of every scored token, for every later paired comparison. Imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llmq.errors import InputError

_FORMAT = {"format": "llmq-token-figures, version 1"}
"""One entry alone: safetensors writes several in an order of chance, and the same figures would have several hashes."""


@dataclass(frozen=True, eq=False)
class TokenFigures:
    """The figures of n scored tokens in W windows, in the text's order.

    Protocol, text and tokenizer are those of the record that names them.
    """

    nll: NDArray[np.float32]
    """[n], -ln p in nats."""
    window_sizes: NDArray[np.int32]
    """[W]: scored tokens of each window, consecutive in `nll`."""
    kl: NDArray[np.float32] | None = None
    """[n], KL(reference || model) in nats; None where nothing was compared."""
    same_top: NDArray[np.bool_] | None = None
    """[n]: model and reference find the same token most likely; None where nothing was compared."""

    @cached_property
    def data(self) -> bytes:
        """A safetensors file of them; the same figures give the same bytes."""
        arrays = {"nll": self.nll, "window_sizes": self.window_sizes}
        if self.kl is not None:
            arrays["kl"] = self.kl
        if self.same_top is not None:
            arrays["same_top"] = self.same_top.astype(np.uint8)
        return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, _FORMAT))

    @cached_property
    def sha256(self) -> str:
        """Of `data`."""
        return hashlib.sha256(self.data).hexdigest()


def parse_tokens(data: bytes, sha256: str, where: str) -> TokenFigures:
    """Read the `data` of token figures; `where` (a file) begins the message of any error.

    Raises:
        InputError: it is damaged, or not what `sha256` names.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{where} does not hold the token figures {sha256[:12]}: it was changed; restore it, or measure again.")
    try:
        arrays = load(data)
        same_top = arrays.get("same_top")
        figures = TokenFigures(
            arrays["nll"], arrays["window_sizes"], arrays.get("kl"), None if same_top is None else same_top.astype(np.bool_)
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{where} holds no token figures ({error}); restore it, or measure again.") from error
    sizes = {array.size for array in (figures.nll, figures.kl, figures.same_top) if array is not None}
    if sizes != {int(figures.window_sizes.sum())}:
        raise InputError(f"{where} is damaged: {sorted(sizes)} tokens in windows of {int(figures.window_sizes.sum())}.")
    return figures
