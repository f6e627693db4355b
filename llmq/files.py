"""Files: hashes, and writes that either happen whole or not at all."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from llmq.errors import OutputError


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_files(paths: list[Path]) -> str:
    """Return one SHA-256 for several files: of each file's own hash, in the order of their names."""
    if len(paths) == 1:
        return sha256_file(paths[0])
    joined = "".join(sha256_file(path) for path in sorted(paths, key=lambda path: path.name))
    return hashlib.sha256(joined.encode()).hexdigest()


def check_absent(path: Path, *, force: bool) -> None:
    """Raise OutputError when `path` exists and `force` does not allow to replace it. Call before the work, not after."""
    if path.exists() and not force:
        raise OutputError(f"output {path} exists already; choose another name, or pass --force to replace it.")


@contextmanager
def atomic_path(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` (create a file or a folder there); it becomes `path` when the block ends well.

    On any exception the temporary is removed and `path` is untouched.
    """
    check_absent(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            # some writers (safetensors) make files that only their owner can read
            temporary.chmod(0o666 & ~_umask())
        if path.is_dir():
            # rename cannot replace a folder that holds files: set the old one aside, so that it is never lost half-way
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)
        else:
            temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        raise OutputError(f"cannot write {path}: {error.strerror or error}; check the folder and the free space.") from error
    except BaseException:
        _remove(temporary)
        raise


def lock_folder(folder: Path) -> int:
    """Return a descriptor that keeps other processes from locking `folder` until it is closed, or the process ends.

    Where the file system knows no locks, everybody gets one.

    Raises:
        OutputError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(f"another process is at work in {folder}; wait for it, or choose another --out.") from error
        except OSError:
            pass  # no locks here, as on some network disks
    return descriptor


def _umask() -> int:
    mask = os.umask(0)  # the only way to ask is to set it
    os.umask(mask)
    return mask


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_MADV_HUGEPAGE = 14
_MADV_PAGEOUT = 21
"""Of Linux 5.4: pages leave memory, and come back from where they were when somebody reads them."""


def page_out(address: int, nbytes: int) -> None:
    """Advise the system that memory is not needed for now: pages that map a file leave it, and nothing is lost.

    Other memory stays as it is where there is no swap. Systems without such an advice keep all of it.
    """
    _advise(address, nbytes, _MADV_PAGEOUT)


def trim_heap() -> None:
    """Give back to the system what the heap holds free; nothing happens where the C library cannot.

    Tensors of some megabytes come from the heap, which keeps them for later: between two phases that want different sizes it
    would hold both.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def use_huge_pages(address: int, nbytes: int) -> None:
    """Advise the system to back memory that nobody has written to yet with huge pages.

    What streams through memory then seldom waits for the address of the next page. Nothing happens where there are none.
    """
    _advise(address, nbytes, _MADV_HUGEPAGE)


def _advise(address: int, nbytes: int, advice: int) -> None:
    advise = _madvise()
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: the others hold neighbours too
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None and end > begin:
        advise(begin, end - begin, advice)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
