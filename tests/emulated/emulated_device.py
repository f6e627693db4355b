"""A device that is not the CPU, on a machine that has none: the arithmetic is the CPU's, bit for bit, and its rules are CUDA's.

A tensor on it wraps a tensor of the CPU. An operator that gets tensors of both devices raises, as CUDA does, unless it copies
between them or the one of the CPU is a number without dimensions. Random numbers are refused: a GPU draws others than the CPU.
Bytes are counted as a GPU's allocator would: those of every storage that some tensor still uses, and the most there ever were.

`register` tells torch of the device, once a process; it goes under the name `EMULATED`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

EMULATED = "emulated"
_COPIES = frozenset({torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default})
_RANDOM = ("normal", "uniform", "bernoulli", "rand", "multinomial", "exponential", "dropout")


class Memory:
    """Bytes on the device: `live` now, and the `peak` since it was last set."""

    def __init__(self) -> None:
        self._users: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def take(self, tensor: Tensor) -> int:
        """Note one more user of a tensor's storage; return what `give` takes."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if not self._users[place]:
            self._sizes[place] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._users[place] += 1
        return place

    def give(self, place: int) -> None:
        """Note that a user has gone."""
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.live -= self._sizes.pop(place)


MEMORY = Memory()


class _Token:
    """What a tensor holds as long as it lives."""

    def __init__(self, raw: Tensor) -> None:
        self._place = MEMORY.take(raw)

    def __del__(self) -> None:
        MEMORY.give(self._place)


class EmulatedTensor(Tensor):
    """A tensor on the device; `raw` is the one on the CPU that holds its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> EmulatedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{EMULATED}:0",
            requires_grad=False,
        )

    def __init__(self, raw: Tensor) -> None:
        self._token = _Token(raw)  # first: it has to outlive nobody
        self.raw = raw

    @property
    def data(self) -> Tensor:
        """See `Tensor.data`."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, EmulatedTensor)
        Tensor.data.__set__(self, value)
        self._token, self.raw = value._token, value.raw

    def data_ptr(self) -> int:
        """See `Tensor.data_ptr`."""
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        """See `Tensor.tolist`."""
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """See `Tensor.numpy`."""
        if not force:
            raise TypeError(f"can't convert {EMULATED}:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"EmulatedTensor({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        for kind in types:
            if kind not in _KINDS:
                return NotImplemented
        strict = _strictness(func)
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if func in _COPIES and not isinstance(args[0], EmulatedTensor):  # from the device to the CPU
            return func(args[0], args[1].raw, *args[2:], **kwargs)
        owners: dict[int, EmulatedTensor] = {}
        out = func(*_raw(strict, args, owners), **{key: _raw(strict, value, owners) for key, value in kwargs.items()})
        if target is not None and torch.device(target).type == "cpu":
            return out if out.untyped_storage().data_ptr() not in _places(owners) else out.clone()
        return _wrapped(out, owners)


_KINDS = frozenset({EmulatedTensor, Tensor, torch.nn.Parameter})


@cache
def _strictness(func: Any) -> int:
    """Return the fewest dimensions with which a tensor of the CPU is refused: 1, or 0 for what is written to; copies take all."""
    name = func._schema.name.partition("::")[2]
    if name.startswith(_RANDOM):
        raise AssertionError(f"{name} draws on the device, where a GPU has other numbers than the CPU; draw there, and move.")
    return 1 << 10 if func in _COPIES else 0 if func._schema.is_mutable else 1


def _raw(strict: int, value: Any, owners: dict[int, EmulatedTensor]) -> Any:
    """Return an operator's argument as the CPU has it, and note which tensors of the device those were."""
    if isinstance(value, EmulatedTensor):
        owners[id(value.raw)] = value
        return value.raw
    if isinstance(value, Tensor):
        if value.dim() >= strict:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {EMULATED}:0 and cpu! "
                f"(one has the shape {list(value.shape)})"
            )
        return value
    if isinstance(value, list | tuple):
        return type(value)([_raw(strict, each, owners) for each in value])
    return value


def _places(owners: dict[int, EmulatedTensor]) -> set[int]:
    return {owner.raw.untyped_storage().data_ptr() for owner in owners.values()}


def _wrapped(out: Any, owners: dict[int, EmulatedTensor]) -> Any:
    if isinstance(out, Tensor):
        own = owners.get(id(out))
        if own is None:
            return EmulatedTensor(out)
        if own.shape != out.shape or own.stride() != out.stride():  # squeeze_ and its like
            Tensor.data.__set__(own, EmulatedTensor(out))
        return own
    if isinstance(out, list | tuple):
        return type(out)(_wrapped(each, owners) for each in out)
    return out


def _on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        kept = {key: value for key, value in kwargs.items() if key not in ("device", "layout", "pin_memory")}
        return EmulatedTensor(make(*args, **kept))

    return made


_LIBRARIES: list[torch.library.Library] = []


def register() -> None:
    """Tell torch of the device."""
    if _LIBRARIES:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=EMULATED)
    library = torch.library.Library("aten", "IMPL")
    for name in (
        "empty.memory_format",
        "empty_strided",
        "arange",
        "arange.start",
        "arange.start_step",
        "linspace",
        "eye",
        "eye.m",
    ):
        base, _, overload = name.partition(".")
        library.impl(name, _on_device(getattr(getattr(torch.ops.aten, base), overload or "default")), "PrivateUse1")
    # otherwise made of other operators for a device that torch does not know, with other roundings than the CPU's own
    library.impl("silu_backward", _on_device(torch.ops.aten.silu_backward.default), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")  # torch.tensor passes by the class
    _LIBRARIES.append(library)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    raws = [each.raw if isinstance(each, EmulatedTensor) else each for each in (source, target)]
    raws[1].copy_(raws[0])
    return target


@contextmanager
def nothing_left() -> Iterator[Memory]:
    """Count the bytes of what is done inside from 0; whatever it leaves on the device fails."""
    import gc

    gc.collect()
    before = MEMORY.live
    MEMORY.peak = before
    yield MEMORY
    gc.collect()
    assert MEMORY.live == before, f"{MEMORY.live - before} bytes were left on the device"
