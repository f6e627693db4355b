"""The environment, read from a machine that the test writes down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmq.results import environment
from llmq.results.environment import (
    available_cores,
    available_memory_bytes,
    capture,
    cpu_features,
    cpu_name,
    last_level_cache_bytes,
)


def machine(root: Path, files: dict[str, str]) -> Path:
    """Write files below a root of their own."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine() -> None:
    here = capture(threads=3, device="cpu")
    assert here.threads == 3
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert 0 < here.memory_bytes <= psutil.virtual_memory().total
    assert here.packages["torch"].startswith("2.")
    assert here.cpu
    assert here.python == ".".join(map(str, sys.version_info[:3]))


def test_nothing_heavy_is_imported() -> None:
    heavy = "sorted(set(sys.modules) & {'torch', 'numpy'})"
    code = f"import sys; from llmq.results.environment import capture; capture(1); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_x86_cpu(tmp_path: Path) -> None:
    cpu = "processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: fpu avx512_vnni avx2 fma\n\nprocessor\t: 1\nmodel name\t: other\n"
    root = machine(tmp_path, {"proc/cpuinfo": cpu})
    assert cpu_name(root) == "Fast 9000"
    assert cpu_features(root) == ["avx2", "fma", "avx512_vnni"]


def test_arm_cpu_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    root = machine(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd i8mm asimddp\n"})
    assert cpu_name(root) == "aarch64"
    assert cpu_features(root) == ["asimd", "asimddp", "i8mm"]


def test_a_machine_without_proc(tmp_path: Path) -> None:
    assert cpu_name(tmp_path)
    assert cpu_features(tmp_path) == []
    assert last_level_cache_bytes(tmp_path) is None
    assert available_memory_bytes(tmp_path) == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/box/inner\n", "sys/fs/cgroup/box/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "20000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/box\n1:memory:/else\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
    ids=["v2", "v2 unlimited", "v2 parent", "less than one", "v1", "v1 unlimited"],
)
def test_cores_respect_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)))
    assert available_cores(machine(tmp_path, files)) == cores


def test_cores_respect_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 5, 7})
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert available_cores(root) == 3


def test_memory_respects_the_control_group(tmp_path: Path) -> None:
    v2 = machine(tmp_path / "v2", {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1048576\n"})
    (v2 / "sys/fs/cgroup/a/b").mkdir()
    (v2 / "sys/fs/cgroup/a/b/memory.max").write_text("max\n")
    assert available_memory_bytes(v2) == 1048576
    v1 = machine(tmp_path / "v1", {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n"})
    assert available_memory_bytes(v1) == 4096


def test_the_largest_cache_is_the_last(tmp_path: Path) -> None:
    cache = "sys/devices/system/cpu/cpu0/cache"
    root = machine(
        tmp_path, {f"{cache}/index0/size": "48K\n", f"{cache}/index3/size": "32768K\n", f"{cache}/index2/size": "2M\n"}
    )
    assert last_level_cache_bytes(root) == 32 << 20
