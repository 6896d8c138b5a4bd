"""Build of the compiled parts: fastgen._C (CPU) and, where nvcc is found, fastgen._C_cuda.

Environment: FASTGEN_CPU=0 (pure-PyTorch install), FASTGEN_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST,
MAX_JOBS, FASTGEN_SANITIZE=1 (address and undefined-behaviour sanitizers, for tests), CUDA_HOME. See
CONTRIBUTING.md.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()

# The oldest libtorch whose stable ABI the kernels use; every newer one loads the same binary.
TORCH_TARGET = (2, 10)
PY_LIMITED_API = (3, 10)
CUDA_ARCHS = "8.0;8.6;9.0;10.0+PTX"

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


def find_nvcc() -> Path | None:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(str(Path(on_path).resolve().parent.parent))
    for home in filter(None, candidates):
        nvcc = Path(home) / "bin" / "nvcc"
        if nvcc.exists():
            return nvcc
    return None


def macros() -> list[tuple[str, str]]:
    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    limited = f"0x{PY_LIMITED_API[0]:02X}{PY_LIMITED_API[1]:02X}0000"
    return [("TORCH_TARGET_VERSION", target), ("Py_LIMITED_API", limited)]


def sources(folder: str, *suffixes: str) -> list[str]:
    found = sorted((ROOT / "csrc" / folder).iterdir())
    return [str(p.relative_to(ROOT)) for p in found if p.suffix in suffixes]


def headers() -> list[str]:
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.h*"))]


WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
# gcc 12 warns about its own AVX-512 header.
WARNINGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Contraction would let the compiler choose where multiply-adds fuse, and AVX2 and AVX-512 would
# differ in bits.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    *WARNINGS,
]
LINK_FLAGS: list[str] = []
if os.environ.get("FASTGEN_SANITIZE") == "1":
    SANITIZE = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ]
    CXX_FLAGS += [*SANITIZE, "-g", "-O1"]
    LINK_FLAGS += SANITIZE


def cpu_extension():
    return cpp_extension.CppExtension(
        "fastgen._C",
        sources("cpu", ".cpp"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros(),
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        depends=headers(),
        py_limited_api=True,
    )


def cuda_extension(nvcc: Path):
    home = nvcc.parent.parent
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    # torch built without CUDA looks for no toolkit of its own.
    cpp_extension.CUDA_HOME = str(home)
    # libtorch pulls libtorch_cuda in where there is one; naming libtorch_cuda would tie the file to
    # CUDA torch.
    link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", *LINK_FLAGS]
    return cpp_extension.CppExtension(
        "fastgen._C_cuda",
        sources("cuda", ".cpp", ".cu"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        library_dirs=[str(home / "lib64")],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        define_macros=[*macros(), ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-std=c++17", "-O3", "-lineinfo"]},
        extra_link_args=link,
        depends=headers(),
        py_limited_api=True,
    )


def plan() -> tuple[list, dict]:
    """The extensions to build, and what fastgen.info will say about them."""
    info = {
        "torch": torch.__version__,
        "torch_target": ".".join(map(str, TORCH_TARGET)),
        "cpu": True,
        "cpu_reason": "built",
        "cuda": False,
        "cuda_reason": "",
        "cuda_archs": "",
    }
    extensions = []
    if env_choice("FASTGEN_CPU", "1", ("0", "1")) == "1":
        extensions.append(cpu_extension())
    else:
        info.update(cpu=False, cpu_reason="left out by FASTGEN_CPU=0")
    wanted = env_choice("FASTGEN_CUDA", "auto", ("auto", "0", "1"))
    nvcc = find_nvcc()
    if wanted == "0":
        info["cuda_reason"] = "left out by FASTGEN_CUDA=0"
    elif nvcc is None:
        info["cuda_reason"] = (
            "nvcc was not found at build time (set CUDA_HOME, or put nvcc on PATH)"
        )
        if wanted == "1":
            sys.exit(f"FASTGEN_CUDA=1, but {info['cuda_reason']}")
    else:
        extensions.append(cuda_extension(nvcc))
        info.update(cuda=True, cuda_reason="built", cuda_archs=os.environ["TORCH_CUDA_ARCH_LIST"])
    return extensions, info


class BuildExtension(cpp_extension.BuildExtension):
    """Adds the build record beside the compiled modules, and says what is built and what is not,
    and why."""

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
        target = ROOT if self.inplace else Path(self.build_lib)
        (target / "fastgen" / "_build.json").write_text(json.dumps(BUILD_INFO, indent=1) + "\n")

    # A build can have no extension at all (FASTGEN_CPU=0); the record is still wanted.
    def get_source_files(self):
        return super().get_source_files() if self.extensions else []


EXTENSIONS, BUILD_INFO = plan()

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": f"cp{PY_LIMITED_API[0]}{PY_LIMITED_API[1]}"}}
    if EXTENSIONS
    else {},
)
