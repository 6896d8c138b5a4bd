"""The CUDA module: built where nvcc is, independent of CUDA's shared libraries, for every
architecture, and on a GPU equal to the CPU kernels."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import _build
from fastgen.ops import _library

ROOT = Path(__file__).parents[1]
MODULE = Path(fastgen.__file__).with_name("_C_cuda.abi3.so")
ARCHS = ("80", "86", "90a", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc():
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return found if Path(found).exists() else None


def find_cuobjdump():
    folders = [Path("/usr/local/cuda/bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = [shutil.which("cuobjdump"), *map(str, (f / "cuobjdump" for f in folders))]
    return next((f for f in found if f and Path(f).exists()), None)


RECORD = _build.info()
NVCC = find_nvcc()
CUOBJDUMP = find_cuobjdump()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
needs_module = pytest.mark.skipif(
    not RECORD["cuda"], reason=f"no CUDA module was built: {RECORD['cuda_reason']}"
)


@needs_nvcc
def test_built_where_nvcc_is():
    if RECORD["cuda_reason"] == "left out by FASTGEN_CUDA=0":
        pytest.skip(RECORD["cuda_reason"])
    assert RECORD["cuda"], RECORD["cuda_reason"]
    assert RECORD["nvcc"]
    assert MODULE.exists()


@needs_module
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_not_loaded_by_a_torch_without_cuda():
    assert "fastgen._C_cuda" not in sys.modules
    assert _library.cuda_unavailable == "this torch has no CUDA"
    assert _library.broken == []


@needs_module
def test_needs_only_the_stable_torch_and_no_cuda_library():
    dynamic = subprocess.run(["readelf", "-d", MODULE], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic.stdout))
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= needed
    assert not [name for name in needed if re.search("cuda|cublas|nvrtc", name)]


@needs_module
@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump here (CUDA toolkit or Triton)")
def test_has_code_for_every_architecture():
    shown = subprocess.run(
        [CUOBJDUMP, "--list-elf", "--list-ptx", MODULE], capture_output=True, text=True, check=True
    ).stdout
    listed = {int(a) for a in re.findall(r"sm_(\d+)\w*\.cubin", shown)}
    asked = {int(float(a) * 10) for a in re.findall(r"\d+\.\d+", RECORD["cuda_archs"])}
    assert listed == asked
    assert (".ptx" in shown) == ("+PTX" in RECORD["cuda_archs"])


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_kernel_spills(source, tmp_path):
    """Registers that do not fit go to memory, silently: ptxas tells."""
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [
            NVCC,
            "-std=c++17",
            "-O3",
            "-Xptxas=-v",
            "-DUSE_CUDA",
            "-DFASTGEN_SM90A",
            "--fatbin",
            str(source),
        ]
        + [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        + ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{include}"]
        + ["--expt-relaxed-constexpr", "-o", str(tmp_path / "x.fatbin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", done.stderr)
    assert {arch for _, arch in kernels} == set(ARCHS), done.stderr
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0")}, done.stderr


#: Of kernels by name: the architecture to look at, and instructions that each of them must have.
INSTRUCTIONS = {
    "screen_sm90_kernel": ("sm_90a", ("HGMMA.64x128x16.F32", "UBLKCP", "STG.E.128")),
    "screen_mma_kernel": ("sm_80", ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128")),
    "pack_rows_kernel": ("sm_80", ("LDG.E.128", "STG.E.128")),
    "pack_codes_kernel": ("sm_80", ("LDG.E.128", "STG.E.128")),
    "settle_kernel": ("sm_80", ("LDG.E.128",)),
    "grad_rows_kernel": ("sm_80", ("LDG.E.128", "STG.E.128")),
    "normal_kernel": ("sm_80", ("STG.E.128",)),
    "reparam_forward_kernelIfLb1ELb1E": ("sm_80", ("LDG.E.128", "STG.E.128")),
    "reparam_forward_kernelI13__nv_bfloat16Lb1ELb1E": ("sm_80", ("LDG.E.128", "STG.E.128")),
    "reparam_backward_kernelIfLb1ELb1E": ("sm_80", ("LDG.E.128", "STG.E.128")),
    "reparam_backward_kernelI13__nv_bfloat16Lb1ELb1E": ("sm_80", ("LDG.E.128", "STG.E.128")),
}

#: Of kernels by name, on every architecture: at most so many registers a thread, and bytes of
#: static shared memory a block. A multiprocessor has 65536 registers, given out by eights a thread:
#: 64 let it hold 1024 threads, 80 let it hold 768. The gradient of reparam_kl needs no more: with
#: three vectors of 16 bytes a thread on their way these are 36 KiB, where 20 KiB keep memory busy
#: (three fifths of 4.3 TB/s are reads, over 132 multiprocessors, waiting a microsecond).
RESOURCES = {
    "philox_words_kernel": (40, 0),
    "normal_kernelIf": (40, 0),
    "normal_kernelI13__nv_bfloat16": (40, 0),
    "reparam_forward_kernelIfLb1ELb1E": (64, 32),
    "reparam_forward_kernelI13__nv_bfloat16Lb1ELb1E": (64, 32),
    "reparam_backward_kernelIfLb1ELb1E": (80, 0),
    "reparam_backward_kernelI13__nv_bfloat16Lb1ELb1E": (80, 0),
    "sum_pieces_kernel": (40, 0),
    # 544 threads a block; two blocks of 256; four, which wait for memory; two of 512.
    "screen_sm90_kernel": (112, 0),
    "screen_mma_kernel": (128, 0),
    "settle_kernelILi4ELb0Ef": (64, 0),
    "open_rows_kernelIf": (128, 45056),
}

#: Bytes of the shared memory of every block that CUDA keeps for itself from 9.0 on.
RESERVED = 1024

#: Instructions that the loop of a kernel for long rows issues for one element, at most, on sm_90,
#: and elements of one round. Derived, not measured: at 4.3 TB/s, 132 multiprocessors with four
#: schedulers and 1.755 GHz, memory leaves time for 41 (6 bytes: bfloat16 forward), 69 (10 bytes:
#: backward), 82 (12 bytes: float32 forward) and 138 (20 bytes: backward).
ISSUED = {
    "reparam_forward_kernelI13__nv_bfloat16Lb1ELb1ELb0E": (43, 8),
    "reparam_forward_kernelI6__halfLb1ELb1ELb0E": (43, 8),
    "reparam_forward_kernelIfLb1ELb1ELb0E": (78, 4),
    "reparam_backward_kernelI13__nv_bfloat16Lb1ELb1ELb0E": (48, 8),
    "reparam_backward_kernelIfLb1ELb1ELb0E": (85, 4),
}


@functools.cache
def machine_code(arch):
    """The disassembly of each kernel."""
    command = [CUOBJDUMP, "-sass", "-arch", arch, MODULE]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = text.split("Function : ")[1:]
    return {part.partition("\n")[0].strip(): part for part in parts}


@needs_module
@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump here (CUDA toolkit or Triton)")
@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_kernels_have_the_instructions_they_are_made_for(kernel):
    arch, wanted = INSTRUCTIONS[kernel]
    if float(arch.strip("sm_a")) / 10 not in map(
        float, re.findall(r"\d+\.\d+", RECORD["cuda_archs"])
    ):
        pytest.skip(f"this build has no code for {arch}")
    found = {name: code for name, code in machine_code(arch).items() if kernel in name}
    assert found
    for name, code in found.items():
        missing = [instruction for instruction in wanted if instruction not in code]
        assert not missing, name


@functools.cache
def resources():
    """(registers, bytes of shared memory) of each kernel on each architecture."""
    command = [CUOBJDUMP, "-res-usage", MODULE]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", text)
    assert found, text
    return [(name, int(registers), int(shared)) for name, registers, shared in found]


@needs_module
@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump here (CUDA toolkit or Triton)")
@pytest.mark.parametrize("kernel", RESOURCES)
def test_kernels_take_no_more_than_they_may(kernel):
    found = [row for row in resources() if kernel in row[0]]
    assert found
    registers, shared = RESOURCES[kernel]
    over = [row for row in found if row[1] > registers or row[2] > shared + RESERVED]
    assert not over


def longest_loop(code):
    """How many instructions lie between a branch back and its target, at most."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.+?);", code)
    spans = [0]
    for at, instruction in lines:
        target = re.search(r"BRA\b.*\b0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < int(at, 16):
            spans.append((int(at, 16) - int(target[1], 16)) // 16 + 1)
    return max(spans)


@needs_module
@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump here (CUDA toolkit or Triton)")
@pytest.mark.parametrize("kernel", ISSUED)
def test_kernels_issue_few_instructions_for_an_element(kernel):
    arch = next((a for a in ("90a", "90") if f"{a[0]}.{a[1:]}" in RECORD["cuda_archs"]), None)
    if arch is None:
        pytest.skip("this build has no code for sm_90")
    found = {name: code for name, code in machine_code(f"sm_{arch}").items() if kernel in name}
    assert found
    most, elements = ISSUED[kernel]
    for name, code in found.items():
        assert 0 < longest_loop(code) / elements <= most, name


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("count", (0, 1, 3, 4, 5, 1023, 1024, 1025, 1_000_003))
@pytest.mark.parametrize("key", ([0, 0], [1234567, 89], [-1, 2**62]))
def test_philox_words_equal_those_of_the_cpu(count, key):
    key = torch.tensor(key)
    expected = torch.ops.fastgen.philox_words(key, count)
    assert torch.equal(torch.ops.fastgen.philox_words(key.cuda(), count).cpu(), expected)


@pytest.mark.gpu
def test_philox_words_on_another_stream_and_in_a_graph():
    key = torch.tensor([7, 0], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        words = torch.ops.fastgen.philox_words(key, 4096)
    stream.synchronize()
    assert torch.equal(words.cpu(), torch.ops.fastgen.philox_words(key.cpu(), 4096))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = torch.ops.fastgen.philox_words(key, 4096)
    for offset in 0, 5:
        key[1] = offset
        graph.replay()
        expected = torch.ops.fastgen.philox_words(torch.tensor([7, offset]), 4096)
        assert torch.equal(replayed.cpu(), expected)


@pytest.mark.gpu
def test_philox_words_checks_its_key():
    for key in (
        torch.zeros(3, dtype=torch.long),
        torch.zeros(2),
        torch.zeros(2, 1, dtype=torch.long),
    ):
        with pytest.raises(RuntimeError, match="philox_words: key has the wrong"):
            torch.ops.fastgen.philox_words(key.cuda(), 4)
    with pytest.raises(RuntimeError, match="philox_words: count must be between"):
        torch.ops.fastgen.philox_words(torch.zeros(2, dtype=torch.long).cuda(), -1)
