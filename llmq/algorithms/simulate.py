"""Try weights on a part of a block before anything is changed: what would its output be, had its linears been quantized?

Searches over scales (AWQ, SmoothQuant) ask this dozens of times. The inputs of the part that a linear belongs to (its
attention or its MLP) are therefore recorded once, and only that part is run again.

An error counts relative to the residual stream that it is added to: the norm of whatever comes next divides both by the stream's
size, so a token whose stream is twice as large bears an error twice as large. `importance` is that weight of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.errors import SchemeError

Forward = Callable[[Tensor], Tensor]


class Work(Protocol):
    """What block-wise methods need of a block; `llmq.schemes.block.BlockWork` has it."""

    module: nn.Module
    linears: dict[str, nn.Linear]
    inputs: Sequence[Tensor]

    def run(self, h: Tensor) -> Tensor:
        """Return the block's output for hidden states [B, T, hidden]."""
        ...


@contextmanager
def replaced(module: nn.Module, forwards: Mapping[str, Forward]) -> Iterator[None]:
    """Let the linears named in `forwards` compute something else for a while; hooks still run."""
    linears = {name: module.get_submodule(name) for name in forwards}
    for name, linear in linears.items():
        linear.forward = forwards[name]  # an instance attribute in front of the class's method
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward


def sample_batches(inputs: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return batches of about `tokens` tokens in total, at least one, evenly spread over all of `inputs` [B, T, hidden]."""
    if not inputs:
        raise SchemeError("a block cannot be tried without inputs; calibrate with at least one window.")
    total = sum(batch.shape[0] * batch.shape[1] for batch in inputs)
    windows = sum(batch.shape[0] for batch in inputs)
    keep = max(1, min(windows, windows * tokens // max(total, 1)))
    chosen = {index * windows // keep for index in range(keep)}
    batches, first = [], 0
    for batch in inputs:
        rows = [index - first for index in range(first, first + batch.shape[0]) if index in chosen]
        first += batch.shape[0]
        if rows:
            batches.append(batch[rows])
    return batches


@dataclass(frozen=True)
class Replay:
    """A part of a block with recorded inputs and the outputs it had.

    Attributes:
        module: the part.
        prefix: its name in the block, with the dot that its linears' names go on with; the whole name where the part is a linear.
        calls: positional and keyword arguments of each call.
        outputs: the output of each call, fp32.
        importance: [B, T] of each call.
    """

    module: nn.Module
    prefix: str
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    outputs: list[Tensor]
    importance: list[Tensor]

    def error(self, forwards: Mapping[str, Forward]) -> float:
        """Return the part's mean squared error, weighted by tokens, when linears (by names in the block) compute `forwards`."""
        inside = {name.removeprefix(self.prefix): forward for name, forward in forwards.items()}
        sums = []
        with torch.no_grad(), replaced(self.module, inside):
            for (args, kwargs), output, importance in zip(self.calls, self.outputs, self.importance, strict=True):
                squares = (self.module(*args, **kwargs) - output).square().mean(-1)
                sums.append(torch.stack([each.sum(dtype=torch.float64) for each in (squares * importance, importance)]))
        totals: list[list[float]] = torch.stack(sums, 1).tolist()  # read once: a GPU is not waited for in between
        return sum(totals[0]) / sum(totals[1])


@dataclass(frozen=True)
class Recording:
    """What `record` saw.

    Attributes:
        replays: of each part, by name.
        inputs: [n, K] of each linear, by name.
        importance: [n] of the same tokens, 1 on average.
    """

    replays: dict[str, Replay]
    inputs: dict[str, Tensor]
    importance: Tensor


def importance_of(stream: Tensor) -> Tensor:
    """Return 1 / mean square [B, T] of a residual stream [B, T, hidden], fp32."""
    return 1 / stream.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)


def part_of(name: str) -> str:
    """Return the name of the part that a linear is tried in: 'self_attn' of 'self_attn.q_proj', 'lm_head' of 'lm_head'."""
    return name.rpartition(".")[0] or name


def record(
    work: Work, parts: Sequence[str], *, inputs_of: Sequence[str], tokens: int, inputs: Sequence[Tensor] | None = None
) -> Recording:
    """Run the block as it is, and record parts of it.

    Args:
        work: the block.
        parts: names of modules in it, see `part_of`.
        inputs_of: names of linears.
        tokens: about how many tokens to run.
        inputs: batches to run instead of all of the block's.

    Returns:
        A replay of each part, and the inputs of each linear of `inputs_of`.

    Raises:
        SchemeError: a part or linear did not run, or an input is not finite.
    """
    modules = {name: work.module.get_submodule(name) for name in dict.fromkeys(parts)}
    replays = {
        name: Replay(module, name if isinstance(module, nn.Linear) else f"{name}.", [], [], [])
        for name, module in modules.items()
    }
    rows: dict[str, list[Tensor]] = {name: [] for name in inputs_of}

    def keep_call(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            replays[name].calls.append((args, kwargs))
            replays[name].outputs.append(output.float())

        return hook

    def keep_rows(name: str) -> Any:
        return lambda _, args: rows[name].append(args[0].detach().float().reshape(-1, args[0].shape[-1]))

    weights: list[Tensor] = []
    handles = [module.register_forward_hook(keep_call(name), with_kwargs=True) for name, module in modules.items()]
    handles += [work.module.get_submodule(name).register_forward_pre_hook(keep_rows(name)) for name in rows]
    try:
        with torch.no_grad():
            for batch in sample_batches(work.inputs if inputs is None else inputs, tokens):
                weights.append(importance_of(work.run(batch)))
                for replay in replays.values():
                    replay.importance.append(weights[-1])
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, replay in replays.items() if not replay.calls] + [name for name in rows if not rows[name]]
    if silent:
        raise SchemeError(f"{', '.join(silent)} did not run when the block did, so nothing is known of the inputs; use --skip.")
    found = {name: torch.cat(batches) for name, batches in rows.items()}
    for name, x in found.items():
        if not bool(torch.isfinite(x).all()):
            raise SchemeError(
                f"the inputs of {name} are not finite during calibration; the model is broken before it is quantized."
            )
    importance = torch.cat([weight.reshape(-1) for weight in weights])
    return Recording(replays, found, importance / importance.mean())
