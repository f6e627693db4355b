"""The library as built: what its objects hold, and the driver under sanitizers, emulated AVX-512 and emulated NEON."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
from native_builds import LLAMA_DRIVER, build_driver, build_library, needs, run

pytestmark = pytest.mark.slow
X86 = platform.machine() in {"x86_64", "AMD64"}
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def checks_by_isa(output: str) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(\S+): (\d+) checks", output, re.MULTILINE)}


def object_of(build: Path, source: str) -> Path:
    (found,) = build.rglob(f"{source}.cpp.o")
    return found


def test_driver_under_sanitizers(tmp_path):
    needs("cmake", "c++")
    build_library(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS=-O1 {SANITIZE}")
    checks = checks_by_isa(run(build_driver(tmp_path, "c++", *SANITIZE.split())))
    assert checks["generic"] > 100_000
    if X86 and " avx2 " in Path("/proc/cpuinfo").read_text():
        assert checks["avx2"] == checks["generic"]
    llama = checks_by_isa(run(build_driver(tmp_path, "c++", *SANITIZE.split(), source=LLAMA_DRIVER)))
    assert llama.keys() == checks.keys()
    assert min(llama.values()) == max(llama.values()) > 100_000


@pytest.mark.skipif(not X86, reason="AVX-512 is x86's")
def test_driver_with_emulated_avx512(tmp_path):
    needs("cmake", "c++")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe is not on this machine (Debian: libsimde-dev)")
    build_library(tmp_path, "-DLLMQ_SIMDE=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1")
    checks = checks_by_isa(run(build_driver(tmp_path, "c++")))
    assert checks["avx512vnni"] == checks["generic"] > 100_000
    llama = checks_by_isa(run(build_driver(tmp_path, "c++", source=LLAMA_DRIVER)))
    assert llama.keys() == checks.keys()
    assert min(llama.values()) == max(llama.values()) > 100_000


def test_driver_on_emulated_neon(tmp_path):
    needs("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")
    build_library(tmp_path, *target)
    driver = build_driver(tmp_path, "aarch64-linux-gnu-g++")
    emulated = run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", driver)
    checks = checks_by_isa(emulated)
    assert checks["neon-dotprod"] == checks["generic"] > 100_000
    old = run("qemu-aarch64", "-cpu", "cortex-a53", "-L", "/usr/aarch64-linux-gnu", driver)  # armv8.0: no sdot
    assert "neon-dotprod: not on this machine" in old
    assert checks_by_isa(old) == {"generic": checks["generic"]}
    llama = build_driver(tmp_path, "aarch64-linux-gnu-g++", source=LLAMA_DRIVER)
    found = checks_by_isa(run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", llama))
    assert found.keys() == checks.keys()
    assert found["neon-dotprod"] == found["generic"] > 100_000


@pytest.mark.skipif(not X86, reason="the register names are x86's")
def test_wide_registers_stay_in_their_own_objects(plain_build):
    needs("objdump")
    portable = dict.fromkeys(("isa_generic", "llmq_cpu", "linear", "pack", "parallel", "registry"), "")
    for source, registers in {**portable, "isa_avx2": "y", "isa_avx512vnni": "yz"}.items():
        code = run("objdump", "-d", "--no-show-raw-insn", object_of(plain_build, source))
        used = set(re.findall(r"%([yz])mm", code))
        assert used <= set(registers), f"{source} uses {used}"
        assert bool(re.search(r"\tv[a-z]", code)) == bool(registers), f"{source}: VEX instructions"
        assert ("vpdpbusd" in code) == ("z" in registers)
        functions = re.split(r"\n\w+ <(?=\w+>:)", code)
        fusing = [function for function in functions if re.search(r"\tvfn?m(add|sub)\d", function)]
        assert bool(fusing) == bool(registers), source
        for function in fusing:  # the scaling of integer sums must round after each operation
            assert "micro_float" in function.partition(">")[0], f"{source} fuses multiplications and additions"


@pytest.mark.skipif(not X86, reason="the register names are x86's")
def test_the_llama_runtime_is_portable_but_for_its_vectors(plain_build):
    needs("objdump")
    for source, registers in {
        "llama": "",
        "llama_abi": "",
        "vector_generic": "",
        "vector_avx2": "y",
        "vector_avx512": "yz",
    }.items():
        code = run("objdump", "-d", "--no-show-raw-insn", object_of(plain_build, source))
        assert set(re.findall(r"%([yz])mm", code)) <= set(registers), source
        assert bool(re.search(r"\tv[a-z]", code)) == bool(registers), f"{source}: VEX instructions"
        assert bool(re.search(r"\tvfmadd\d", code)) == bool(registers), f"{source}: fused multiplications and additions"


def test_objects_of_an_instruction_set_share_nothing(plain_build):
    """A function that the linker may take from any object must not lie in one that is not for every machine."""
    needs("nm")
    objects = [path for kind in ("isa", "vector") for path in plain_build.rglob(f"{kind}_*.o") if "generic" not in path.name]
    assert len(objects) >= 2
    for path in objects:
        defined = [line.split()[-2:] for line in run("nm", "--defined-only", path).splitlines()]
        shared = [name for kind, name in defined if kind not in "abdrst"]
        assert len(shared) == 1, f"{path.name} defines {shared}"
        assert re.fullmatch(r"_ZN4llmq\d+k\w+E", shared[0])


def test_exports_the_header_and_nothing_else(plain_build):
    needs("nm")
    names = {line.split()[-1] for line in run("nm", "-D", "--defined-only", plain_build / "libllmq_cpu.so").splitlines()}
    header = (Path(__file__).parents[2] / "kernels" / "cpu" / "llmq_cpu.h").read_text()
    assert names == set(re.findall(r"LLMQ_API [\w ]+[ *]+(llmq_\w+)\(", header))


def test_needs_only_libc_and_openmp(plain_build):
    needs("readelf")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", plain_build / "libllmq_cpu.so"))
    assert {name.split(".so")[0] for name in needed} <= {"libc", "libgomp", "libm"}
