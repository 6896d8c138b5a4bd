"""Build of the compiled parts: fastgen._C (CPU) and, where nvcc is found, fastgen._C_cuda.

Environment: FASTGEN_CPU=0 (pure-PyTorch install), FASTGEN_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST,
MAX_JOBS, FASTGEN_SANITIZE=1 (address and undefined-behaviour sanitizers, for tests), CUDA_HOME. See
CONTRIBUTING.md.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()

# The oldest libtorch whose stable ABI the kernels use; every newer one loads the same binary.
TORCH_TARGET = (2, 10)
PY_LIMITED_API = (3, 10)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "fastgen builds against the PyTorch that is installed, and there is none. Install "
        f"torch >= {TORCH_TARGET[0]}.{TORCH_TARGET[1]} first, then run:  "
        "pip install --no-build-isolation ."
    )


def env_choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def find_cuda() -> Path | None:
    """The folder of a CUDA toolkit that has both the compiler and the headers."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named and not has_toolkit(Path(named)):
        sys.exit(f"CUDA_HOME={named!r}: expected bin/nvcc and include/cuda_runtime.h in it")
    on_path = shutil.which("nvcc")
    candidates = [named, on_path and Path(on_path).resolve().parent.parent, "/usr/local/cuda"]
    return next((Path(c) for c in candidates if c and has_toolkit(Path(c))), None)


def has_toolkit(home: Path) -> bool:
    return (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists()


def cuda_version(home: Path) -> tuple[int, int]:
    nvcc = [str(home / "bin" / "nvcc"), "--version"]
    text = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        sys.exit(f"{nvcc[0]} --version: expected a line with 'release X.Y', got {text!r}")
    return int(found[1]), int(found[2])


def default_archs(version: tuple[int, int]) -> str:
    """Every architecture that is tested, and PTX for GPUs to come. 9.0a is 9.0, which every GPU of
    that generation is, with its matrix instructions; its PTX would run on nothing else."""
    return "8.0;8.6;9.0a;10.0+PTX" if version >= (12, 8) else "8.0;8.6+PTX;9.0a"


def hopper_macros() -> list[tuple[str, None]]:
    """Says that 9.0 devices get code of 9.0a. With both in the file, CUDA would choose."""
    archs = re.split("[; ]+", os.environ["TORCH_CUDA_ARCH_LIST"].replace("+PTX", ""))
    return [("FASTGEN_SM90A", None)] if "9.0a" in archs and "9.0" not in archs else []


def macros() -> list[tuple[str, str]]:
    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    limited = f"0x{PY_LIMITED_API[0]:02X}{PY_LIMITED_API[1]:02X}0000"
    return [("TORCH_TARGET_VERSION", target), ("Py_LIMITED_API", limited)]


def sources(folder: str) -> list[str]:
    found = sorted((ROOT / "csrc" / folder).iterdir())
    return [str(p.relative_to(ROOT)) for p in found if p.suffix in (".cpp", ".cu")]


def headers(folder: str) -> list[str]:
    """What the kernels of a folder may include; csrc/emulation is for tests only."""
    found = [p for part in ("common", folder) for p in (ROOT / "csrc" / part).glob("*.*h")]
    return [str(p.relative_to(ROOT)) for p in sorted(found)]


def headers_digest() -> str:
    """Changes when a header does: torch lets ninja track what a .cu includes only where torch
    itself has CUDA."""
    text = b"".join((ROOT / p).read_bytes() for p in headers("cuda"))
    return hashlib.sha256(text).hexdigest()[:16]


WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
# gcc 12 warns about its own AVX-512 header.
WARNINGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Contraction would let the compiler choose where multiply-adds fuse, and AVX2 and AVX-512 would
# differ in bits.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    *WARNINGS,
]
LINK_FLAGS: list[str] = []
SANITIZED = env_choice("FASTGEN_SANITIZE", "0", ("0", "1")) == "1"
if SANITIZED:
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    # The address sanitizer finds null dereferences by itself, and these cost minutes of compiling.
    SANITIZE += ["-fno-sanitize=null,object-size,vptr"]
    CXX_FLAGS += [*SANITIZE, "-fno-omit-frame-pointer", "-g1", "-O1"]
    LINK_FLAGS += SANITIZE


def cpu_extension():
    return cpp_extension.CppExtension(
        "fastgen._C",
        sources("cpu"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros(),
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        depends=headers("cpu"),
        py_limited_api=True,
    )


def cuda_extension(home: Path):
    # torch built without CUDA looks for no toolkit of its own.
    cpp_extension.CUDA_HOME = str(home)
    nvcc_flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
    nvcc_flags += [f"-DFASTGEN_HEADERS={headers_digest()}"]
    # libtorch pulls libtorch_cuda in where there is one; naming libtorch_cuda would tie the file to
    # CUDA torch.
    link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", *LINK_FLAGS]
    return cpp_extension.CppExtension(
        "fastgen._C_cuda",
        sources("cuda"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        library_dirs=[str(home / "lib64"), str(home / "lib")],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        define_macros=[*macros(), ("USE_CUDA", None), *hopper_macros()],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags},
        extra_link_args=link,
        depends=headers("cuda"),
        py_limited_api=True,
    )


def plan_cpu() -> tuple[list, dict]:
    if env_choice("FASTGEN_CPU", "1", ("0", "1")) == "0":
        return [], {"cpu": False, "cpu_reason": "left out by FASTGEN_CPU=0"}
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(
            "fastgen: Python.h is missing, so nothing can be compiled. On Debian and Ubuntu: "
            "apt install python3-dev g++ ; without compiled kernels: FASTGEN_CPU=0 FASTGEN_CUDA=0"
        )
    return [cpu_extension()], {"cpu": True, "cpu_reason": "built"}


def plan_cuda() -> tuple[list, dict]:
    wanted = env_choice("FASTGEN_CUDA", "auto", ("auto", "0", "1"))
    home = None if wanted == "0" else find_cuda()
    if home is not None:
        version = cuda_version(home)
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_archs(version))
        record = {"cuda": True, "cuda_reason": "built", "cuda_archs": archs}
        return [cuda_extension(home)], {**record, "nvcc": ".".join(map(str, version))}
    if wanted == "0":
        reason = "left out by FASTGEN_CUDA=0"
    else:
        reason = "nvcc was not found at build time (set CUDA_HOME, or put nvcc on PATH)"
    if wanted == "1":
        sys.exit(f"FASTGEN_CUDA=1, but {reason}")
    return [], {"cuda": False, "cuda_reason": reason, "cuda_archs": "", "nvcc": None}


def plan() -> tuple[list, dict]:
    """The extensions to build, and what fastgen.info will say about them."""
    cpu, cpu_record = plan_cpu()
    cuda, cuda_record = plan_cuda()
    record = {
        "torch": torch.__version__,
        "torch_target": ".".join(map(str, TORCH_TARGET)),
        "sanitized": SANITIZED,
        **cpu_record,
        **cuda_record,
    }
    return [*cpu, *cuda], record


def write_record(folder: Path) -> None:
    (folder / "fastgen" / "_build.json").write_text(json.dumps(BUILD_INFO, indent=1) + "\n")


class Build(build):
    """Starts from an empty folder: what an earlier build left there would end up in the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPython(build_py):
    """Adds the build record, also where there is nothing to compile."""

    def run(self):
        super().run()
        write_record(ROOT if self.editable_mode else Path(self.build_lib))


class BuildExtension(cpp_extension.BuildExtension):
    """Says what is built and what is not, why, and what to try when it fails."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:
            # pip gives an editable build a fresh temporary folder, and everything would be
            # compiled again.
            name = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / name)

    def run(self):
        print(f"fastgen: CPU kernels: {BUILD_INFO['cpu_reason']}")
        print(f"fastgen: CUDA kernels: {BUILD_INFO['cuda_reason']}")
        try:
            super().run()
        except Exception:
            print(
                "fastgen: the build failed. Every compiler line: "
                "pip install --no-build-isolation -v . ; without CUDA kernels: FASTGEN_CUDA=0 ; "
                "pure PyTorch: FASTGEN_CPU=0 FASTGEN_CUDA=0",
                file=sys.stderr,
            )
            raise
        if self.inplace:
            write_record(ROOT)


EXTENSIONS, BUILD_INFO = plan()

setup(
    packages=[*find_packages(include=["fastgen", "fastgen.*"]), "fastgen.kernels"],
    ext_modules=EXTENSIONS,
    cmdclass={
        "build": Build,
        "build_py": BuildPython,
        "build_ext": BuildExtension.with_options(use_ninja=True),
    },
    options={"bdist_wheel": {"py_limited_api": f"cp{PY_LIMITED_API[0]}{PY_LIMITED_API[1]}"}}
    if EXTENSIONS
    else {},
)
