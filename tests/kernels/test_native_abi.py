"""The Python side of the C ABI: signatures, loading, and what happens when the library is not there."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.errors import KernelError
from llmq.ops import native, native_abi
from llmq.ops.cpu import NATIVE_KERNELS

HEADER = Path(__file__).parents[2] / "kernels" / "cpu" / "llmq_cpu.h"
STRUCTS = {struct.__name__: struct for struct in native_abi.STRUCTS}
C_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@pytest.fixture
def loading_anew():
    """Forget the loaded library before and after."""
    for keeper in (native._loaded, native.kernels):
        keeper.cache_clear()
    yield
    for keeper in (native._loaded, native.kernels):
        keeper.cache_clear()


def ctypes_of(declaration: str, is_result: bool) -> type:
    declaration = declaration.strip()
    if "*" not in declaration:
        return C_TYPES[declaration.split()[0]]
    if declaration.startswith("const char*"):
        return ctypes.c_char_p
    if declaration.startswith("int64_t*"):
        return ctypes.POINTER(ctypes.c_int64)
    assert not is_result
    return ctypes.c_void_p


def header_code() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def header_signatures():
    for result, name, arguments in re.findall(r"LLMQ_API ([\w ]+\*?) ?(llmq_\w+)\(([^)]*)\);", header_code()):
        listed = [] if arguments.strip() == "void" else arguments.split(",")
        yield name, ctypes_of(result, is_result=True), tuple(ctypes_of(one, is_result=False) for one in listed)


def header_structs():
    """(name, ((field, type), ...)) of each struct."""
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", header_code(), flags=re.DOTALL):
        fields = []
        for declaration in filter(None, (line.strip() for line in body.split(";"))):
            of = re.match(r"(?:const )?(\w+)", declaration)[1]
            if "*" in declaration:
                fields.append((declaration.split("*")[-1].removeprefix(" const").strip(), ctypes.c_void_p))
            else:
                names = declaration.removeprefix(of).split(",")
                fields.extend((name.strip(), C_TYPES.get(of) or STRUCTS[of]) for name in names)
        yield name, tuple(fields)


def test_signatures_are_the_headers():
    in_header = list(header_signatures())
    assert len(in_header) == HEADER.read_text().count("\nLLMQ_API ") > 10
    assert list(native.SIGNATURES) == in_header


def test_structs_are_the_headers():
    in_header = list(header_structs())
    assert len(in_header) == header_code().count("typedef struct") > 0
    assert [(struct.__name__, tuple(struct._fields_)) for struct in native_abi.STRUCTS] == in_header


def test_constants_are_the_headers():
    defined = {name: int(value) for name, value in re.findall(r"#define LLMQ_(\w+) (\d+)", HEADER.read_text())}
    assert defined["ABI_VERSION"] == native.ABI_VERSION
    assert defined["MAX_K"] == native.LARGEST_K
    kinds = ("WEIGHT_", "ZERO_", "SCALE_", "ACTIVATION_", "DTYPE_", "CACHE_", "OUTPUT_")
    ours = {name: value for name, value in vars(native_abi).items() if name.startswith(kinds)}
    assert ours == {name: value for name, value in defined.items() if name.startswith(kinds)}
    assert all(any(name.startswith(kind) for name in ours) for kind in kinds)


@pytest.mark.usefixtures("native_library")
def test_status_names_what_is_used():
    status = native.status()
    assert isinstance(status, native.Available)
    assert Path(status.path).name == "libllmq_cpu.so"
    assert status.features[0] == "generic"
    assert status.isa in status.features
    assert status.threading in {"openmp", "serial"}
    assert native.kernels().name == status.isa
    with pytest.raises(KernelError, match="does not run the native kernels' 'mmx'; it runs generic"):
        native.kernels("mmx")


def _without(monkeypatch, path: Path | None) -> str:
    monkeypatch.delenv("LLMQ_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(native, "_library_path", lambda: path)
    status = native.status()
    assert isinstance(status, native.Unavailable)
    return status.reason


def test_no_library_is_a_value_with_a_reason(monkeypatch, loading_anew):
    assert "was not built" in _without(monkeypatch, None)
    with pytest.raises(KernelError, match=r"cannot be used: libllmq_cpu\.so was not built"):
        torch.ops.llmq.quantize_per_token(torch.ones(1, 2), 1e-5)
    for kernel in NATIVE_KERNELS:
        support = kernel.available()
        assert not support.ok
        assert "was not built" in support.reason
        assert kernel.layout == kernel.name  # which nothing is laid out in
    monkeypatch.setenv("LLMQ_REQUIRE_NATIVE", "1")
    with pytest.raises(KernelError, match="LLMQ_REQUIRE_NATIVE is 1"):
        native.status()


def test_a_file_that_is_no_library(monkeypatch, loading_anew, tmp_path):
    broken = tmp_path / "libllmq_cpu.so"
    broken.write_bytes(b"not a library")
    assert "cannot be loaded" in _without(monkeypatch, broken)


def test_a_library_that_lacks_a_symbol(monkeypatch, loading_anew):
    other = next(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*"), None) or ctypes.util.find_library("m")
    assert "undefined symbol: llmq_abi_version" in _without(monkeypatch, Path(other))


@pytest.mark.usefixtures("native_library")
def test_another_abi_version_is_refused(monkeypatch, loading_anew):
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert "has ABI version" in _without(monkeypatch, native._library_path())


def in_fresh_process(code: str) -> str:
    root = str(Path(native.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("native_library")
def test_loads_late_and_brings_no_second_openmp():
    """Two OpenMP runtimes are two pools of threads that spin against each other."""
    lines = in_fresh_process(
        "import re, torch\n"
        "from llmq.ops import native\n"
        "maps = lambda: open('/proc/self/maps').read()\n"
        "print('libllmq_cpu' in maps())\n"
        "k = native.kernels()\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(64, 512)\n"
        "numbers = (512, 512, 512, 1, 0, 1, 1)\n"
        "packed = k.pack(torch.ones(512, 512, dtype=torch.int8), torch.ones(512, 1), None, native.LlmqLinear(*numbers, 1e-5))\n"
        "k.linear(x, packed, None, numbers, 1e-5)\n"
        "torch.nn.functional.linear(x, x)\n"
        "print('libllmq_cpu' in maps())\n"
        "print(len(set(re.findall(r'\\S*lib(?:gomp|iomp5|omp)[-.]\\S*', maps()))))\n"
    ).split()
    assert lines == ["False", "True", "1"]
