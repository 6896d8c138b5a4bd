"""What every test runs under: fixed seeds, and fresh memory filled with NaN so that an unwritten
output fails."""

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.cpp_extension import include_paths

from fastgen.ops import _library

# What cuBLAS must find when it starts, to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def two_ranks(tmp_path):
    """Starts a script twice, as `SCRIPT RANK STORE`, and gives what each rank printed."""

    def outputs(script, timeout):
        paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(tmp_path / "store")],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
            for rank in range(2)
        ]
        printed = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        for rank, output in zip(ranks, printed, strict=True):
            assert rank.returncode == 0, output
        return printed

    return outputs


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory():
    # Deterministic mode fills fresh memory with NaN, in C++ as well. On a GPU it only warns: there,
    # cumsum, which references use, has no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _triton_interpreter():
    """It computes with numpy, which warns where a GPU gives infinity or NaN, and takes its time by
    the operation, not by the element; by default it also patches the language anew for every call
    of a function by another, which takes longer than the call."""
    if _library.triton_interprets:
        _patch_the_language_once()
        importlib.import_module("fastgen.kernels.rq_spline")._TILE_BYTES = 2**13
        norms = importlib.import_module("fastgen.kernels.instance_norm")
        norms._CHUNK, norms._PROGRAMS = (2**16,) * 3, 8
    with numpy.errstate(all="ignore"):
        yield


def _patch_the_language_once():
    """Once for the globals of every module that has functions, and for good."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


@pytest.fixture
def threads():
    """Sets the number of threads for a test; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def isa():
    """Forces an instruction set of the CPU kernels: isa("avx2") is False where it is missing."""
    before = torch.ops.fastgen.cpu_isa()

    def force(name):
        try:
            torch.ops.fastgen.force_cpu_isa(_library.CPU_ISAS.index(name))
        except RuntimeError:
            return False
        return True

    yield force
    torch.ops.fastgen.force_cpu_isa(before)


@pytest.fixture
def forward_mode():
    """Forward mode, loaded: PyTorch scripts its formulas at the first use, and warns of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script`", FutureWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@pytest.fixture(scope="session")
def compiled(request):
    """compiled(source, suffix, *flags): what tests/cpp/<source> compiles to, once for a state of
    csrc.

    The flags are those of setup.py that decide about rounding; g++ takes csrc/emulation for CUDA.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to build tests/cpp with")
    root = Path(__file__).parents[1]
    command = [compiler, "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-w", "-pthread"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    csrc = root / "csrc"
    command += [f"-I{path}" for path in (csrc, csrc / "emulation" / "include", *include_paths())]
    files = [*csrc.rglob("*.*h"), *(p for p in (root / "tests" / "cpp").rglob("*") if p.is_file())]
    texts = b"".join(p.read_bytes() for p in sorted(files))

    def build(source, suffix, *flags):
        path = root / "tests" / "cpp" / source
        line = [*command, *flags, str(path), "-o"]
        digest = hashlib.sha256(repr((line, sys.version)).encode() + texts).hexdigest()[:16]
        target = request.config.cache.mkdir("native") / f"{path.stem}-{digest}{suffix}"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*line, str(partial)], check=True)
            partial.replace(target)
        return target

    return build


@pytest.fixture(scope="session")
def native(compiled):
    """native(name, optimization): the pybind11 module tests/cpp/<name>.cpp: test-only access to
    what is below the operators."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]

    def load(name, optimization="-O3"):
        target = compiled(f"{name}.cpp", ".so", optimization, "-shared", "-fPIC", *includes)
        spec = importlib.util.spec_from_file_location(Path(name).name, target)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def pytest_configure(config):
    # torch's own: dynamo instantiates a Function, the batched fallback is announced, pynvml is old.
    for line in (
        "ignore:.*should not be instantiated.*:DeprecationWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
        "ignore:.*does not have a deterministic implementation.*:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
