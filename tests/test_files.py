"""Writes that happen whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import sys
from pathlib import Path

import pytest

from llmq.errors import OutputError
from llmq.files import atomic_path, check_absent, page_out, sha256_file, sha256_files, sha256_text


def test_a_file_appears_whole_and_is_readable_by_all_that_umask_allows(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "out") as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text("all")
        assert not (tmp_path / "new" / "out").exists()
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new" / "out").read_text() == "all"
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_old_one_and_no_temporary(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(error), atomic_path(out, force=True) as temporary:
        temporary.write_text("half")
        raise error
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_a_folder_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(OutputError, match="--force"), atomic_path(out):
        pass
    with pytest.raises(OutputError):
        check_absent(out, force=False)
    with atomic_path(out, force=True) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hashes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"one", b"two"))
    assert sha256_file(a) == sha256_text("one") == sha256_files([a]) == one
    assert sha256_files([b, a]) == sha256_files([a, b]) == hashlib.sha256((one + two).encode()).hexdigest()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the advice is Linux's")
def test_pages_of_a_file_leave_memory_and_come_back(tmp_path: Path) -> None:
    pages = 64
    path = tmp_path / "data"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (pages * mmap.PAGESIZE // 256))
        file.flush()
        os.fsync(file.fileno())  # what is not written yet cannot leave
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    expected = sum(mapping[:])

    def resident() -> int:
        entries = Path("/proc/self/smaps").read_text().split(f"{address:x}-", 1)[1]
        return int(re.search(r"^Rss:\s+(\d+) kB", entries, re.MULTILINE)[1]) * 1024

    assert resident() == pages * mmap.PAGESIZE
    page_out(address + 1, (pages - 2) * mmap.PAGESIZE)  # an odd address: whole pages only
    assert resident() <= 4 * mmap.PAGESIZE
    assert sum(mapping[:]) == expected
    page_out(address + 1, 10)  # less than a page
