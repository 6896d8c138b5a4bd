"""What csrc takes from PyTorch's headers is what the oldest release that it compiles for has.

The stable ABI binds the binary to TORCH_TARGET of setup.py: newer functions are hidden by the
headers themselves. Macros are not, so what only newer headers define compiles here and nowhere
else. `torch_names.txt` lists what csrc may use.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for part in ("common", "cpu", "cuda") for p in (ROOT / "csrc" / part).iterdir())
LIST = Path(__file__).with_name("torch_names.txt")
INSTALLED = Path(torch.__file__).parent / "include"
#: `include` folders of other releases of PyTorch, as in PATH.
OTHERS = [Path(p) for p in os.environ.get("FASTGEN_TORCH_INCLUDES", "").split(os.pathsep) if p]

PUBLIC = ("csrc/stable", "headeronly", "csrc/inductor/aoti_torch/c")
COMMENTS = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
SPELLED = re.compile(
    r"<(torch/[\w/.]+)>"
    r"|\b((?:STD|STABLE|TORCH|C10|AT|AOTI)_[A-Z0-9_]+|(?:aoti_)?torch_\w+)\b"
    r"|\b(torch(?:::\w+)+|(?:ScalarType|MemoryFormat)::\w+)"
)
CALLED = re.compile(r"(?:\.|->)(\w+)\s*[<(]")


def code(path):
    return COMMENTS.sub(" ", path.read_text())


def public_headers(include):
    return [p for part in PUBLIC for p in sorted((include / "torch" / part).rglob("*.h"))]


def names_used(text, include):
    """Headers, macros, functions, enumerators and methods of PyTorch that C++ code names."""
    found = {next(filter(None, match)) for match in SPELLED.findall(text)}
    macros = {m for p in public_headers(include) for m in re.findall(r"#define (\w+)", code(p))}
    tensor = code(include / "torch/csrc/stable/tensor_struct.h")
    tensor += code(include / "torch/csrc/stable/tensor_inl.h")
    methods = set(re.findall(r"(\w+)\(", tensor))
    return found | set(re.findall(r"\w+", text)) & macros | set(CALLED.findall(text)) & methods


def listed():
    lines = LIST.read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_uses_what_the_oldest_release_has():
    used = names_used("\n".join(map(code, SOURCES)), INSTALLED)
    assert len(used) > 30
    new, unused = sorted(used - listed()), sorted(listed() - used)
    assert not new, f"csrc: {new} not in {LIST.name}, whose head says what to do"
    assert not unused, f"{LIST.name}: {unused} not used by csrc"


@pytest.mark.parametrize(
    ("line", "name"),
    (
        ("STABLE_TORCH_ERROR_CODE_CHECK(f(x));", "STABLE_TORCH_ERROR_CODE_CHECK"),
        ("#include <torch/csrc/stable/device.h>", "torch/csrc/stable/device.h"),
        ("torch::stable::from_blob(p, sizes);", "torch::stable::from_blob"),
        ("aoti_torch_get_numel(x, &n);", "aoti_torch_get_numel"),
        ("auto t = ScalarType::Float4_e2m1fn_x2;", "ScalarType::Float4_e2m1fn_x2"),
        ("x.defined();", "defined"),
    ),
)
def test_sees_every_kind_of_name(line, name):
    assert name in names_used(line, INSTALLED) - listed()


@pytest.mark.slow
@pytest.mark.parametrize("include", OTHERS, ids=str)
def test_compiles_against_other_releases(include):
    text = "\n".join(map(code, public_headers(include)))
    for name in listed():
        if name.startswith("torch/"):
            assert (include / name).exists(), name
        else:
            assert re.search(rf"\b{name.split('::')[-1]}\b", text), name
    flags = ["-std=c++17", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DPy_LIMITED_API=0x030A0000", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    flags += [f"-I{sysconfig.get_path('include')}"]
    compilers = {".cpp": ["g++", "-fsyntax-only"]}
    if shutil.which("nvcc"):
        compilers[".cu"] = ["nvcc", "-cuda", "-arch=compute_80", "-Xcicc=-O0", "-o", os.devnull]
        compilers[".cu"] += ["--expt-relaxed-constexpr", "-DUSE_CUDA"]
    failed = [
        f"{source.name}: {done.stderr}"
        for source in SOURCES
        if source.suffix in compilers
        for done in [
            subprocess.run(
                [*compilers[source.suffix], *flags, source], capture_output=True, text=True
            )
        ]
        if done.returncode != 0
    ]
    assert not failed, "\n".join(failed)
