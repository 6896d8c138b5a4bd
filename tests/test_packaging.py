"""What is in the wheel and the sdist, and that installs of every kind work: built, pure Python,
broken."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import fastgen
from fastgen import _build

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastgen.__file__).parent
in_tree = pytest.mark.skipif(PACKAGE.parent != ROOT, reason="fastgen is not installed with -e")


def call(*command, cwd=None, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def build_wheel(tmp_path_factory):
    """Builds a wheel of the tree; what was compiled before is only linked again."""

    def build(**environment):
        folder = tmp_path_factory.mktemp("wheel")
        call(
            *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"),
            *("-w", folder, ROOT),
            **{"FASTGEN_SANITIZE": "0", **environment},
        )
        (wheel,) = folder.glob("*.whl")
        return wheel

    return build


@pytest.fixture(scope="session")
def wheel(build_wheel):
    cuda = "1" if _build.info()["cuda"] else "0"
    return build_wheel(FASTGEN_CUDA=cuda, TORCH_CUDA_ARCH_LIST=_build.info()["cuda_archs"])


@pytest.fixture(scope="session")
def pure_wheel(build_wheel):
    return build_wheel(FASTGEN_CPU="0", FASTGEN_CUDA="0")


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees this one's packages, but not this fastgen: (its Python, its
    site-packages)."""
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    # Folders named in a .pth file have their own .pth files ignored, so editable installs there
    # stay out.
    seen = [p for p in sys.path if p.endswith("site-packages")]
    (site / "base.pth").write_text("\n".join(seen) + "\n")
    return tmp_path / "venv" / "bin" / "python", site


@pytest.fixture
def install(environment, tmp_path):
    """Installs a wheel in that environment; returns its Python."""
    python, site = environment

    def into_it(path):
        call(
            *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"),
            *("--target", site, path),
        )
        where = call(python, "-c", "import fastgen; print(fastgen.__file__)", cwd=tmp_path)
        assert Path(where.strip()).is_relative_to(site), where
        return python

    return into_it


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


# --- the compiled modules ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ("_C", "_C_cuda"))
def test_modules_use_only_the_stable_abi(name):
    """One undefined C++ symbol of torch would tie the file to one release of it."""
    module = PACKAGE / f"{name}.abi3.so"
    if not module.exists():
        pytest.skip(f"{name} was not built: {_build.info()}")
    undefined = call("nm", "-D", "--undefined-only", module)
    symbols = [line.split()[-1] for line in undefined.splitlines()]
    assert "torch_library_impl" in symbols
    assert not [s for s in symbols if re.search(r"N[KRVO]*(2at|3c10|5torch|8pybind11)\d", s)]
    python = [s for s in symbols if s.startswith(("Py", "_Py"))]
    assert python == ["PyModule_Create2"]


@pytest.fixture
def setup_file(monkeypatch):
    """setup.py as a module, its call of setup() left out."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("FASTGEN_CPU", "1")
    monkeypatch.setenv("FASTGEN_CUDA", "0")
    spec = importlib.util.spec_from_file_location("fastgen_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_target_version_is_torch_2_10(setup_file):
    macros = dict(setup_file.macros())
    assert macros["TORCH_TARGET_VERSION"] == "0x020a000000000000"
    assert macros["Py_LIMITED_API"] == "0x030A0000"
    required = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, required.groups())) == setup_file.TORCH_TARGET
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= setup_file.TORCH_TARGET


def test_no_nvcc_is_said_and_insisting_is_an_error(setup_file, monkeypatch):
    monkeypatch.setattr(setup_file, "has_toolkit", lambda home: False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("FASTGEN_CUDA", "auto")
    extensions, record = setup_file.plan()
    assert [e.name for e in extensions] == ["fastgen._C"]
    assert not record["cuda"]
    assert record["cuda_reason"].startswith("nvcc was not found at build time")
    monkeypatch.setenv("FASTGEN_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTGEN_CUDA=1, but nvcc was not found"):
        setup_file.plan()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match="CUDA_HOME='/nowhere': expected bin/nvcc"):
        setup_file.plan()


def test_wrong_build_variables_stop_the_build(setup_file, monkeypatch):
    monkeypatch.setenv("FASTGEN_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTGEN_CUDA: expected one of auto, 0, 1, got 'yes'"):
        setup_file.plan()


def test_architectures_fit_the_compiler(setup_file):
    assert setup_file.default_archs((12, 4)) == "8.0;8.6+PTX;9.0a"
    assert setup_file.default_archs((13, 0)) == "8.0;8.6;9.0a;10.0+PTX"


# --- broken and partial installs ---------------------------------------------------------------

FALLS_BACK = """
import warnings
import torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import fastgen
    x = torch.ones(2, 3)
    fastgen.ops.affine_coupling(x, x, x)
    fastgen.ops.affine_coupling(x, x, x)
ours = [str(w.message) for w in seen if str(w.message).startswith("fastgen")]
assert len(ours) == 1, ours
assert "fastgen._C does not load" in ours[0] and "pip install" in ours[0], ours
assert fastgen.backends.calls() == {("affine_coupling", "reference"): 2}
assert "does not load" in fastgen.explain("affine_coupling", x, x, x).rejected["cpu"]
from fastgen import info
assert info.main([]) == 1
"""


UNDEFINED = (
    "void no_such_symbol_in_torch(void); void *PyInit__C(void) { no_such_symbol_in_torch(); }"
)


def _empty(module):
    module.write_bytes(b"")


def _not_a_library(module):
    module.write_bytes(b"<html>404</html>" * 64)


def _wants_a_missing_symbol(module):
    """What a module built for a newer torch does."""
    source = module.with_name("module.c")
    source.write_text(UNDEFINED)
    call("cc", "-shared", "-fPIC", "-w", source, "-o", module)


@pytest.fixture(params=(_empty, _not_a_library, _wants_a_missing_symbol))
def broken(request, environment):
    """An installed package whose compiled module does not load: (its Python, its folder)."""
    python, site = environment
    package = site / "fastgen"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, package, ignore=ignored)
    request.param(package / "_C.abi3.so")
    record = package / "_build.json"
    record.write_text(record.read_text().replace('"cuda": true', '"cuda": false'))
    return python, package


def test_broken_module_warns_once_and_falls_back(broken, tmp_path):
    python, _ = broken
    out = call(python, "-c", FALLS_BACK, cwd=tmp_path, FASTGEN_STRICT="0")
    assert "BROKEN: fastgen._C does not load" in out


def test_broken_module_is_an_error_under_strict(broken, tmp_path):
    done = subprocess.run(
        [broken[0], "-c", "import fastgen"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "FASTGEN_STRICT": "1"},
    )
    assert done.returncode != 0
    assert "ImportError: fastgen: fastgen._C does not load" in done.stderr


def test_sources_that_were_never_built_are_not_taken_for_a_good_install(broken, tmp_path):
    python, package = broken
    (package / "_build.json").unlink()
    (package / "_C.abi3.so").unlink()
    call(python, "-c", FALLS_BACK, cwd=tmp_path, FASTGEN_STRICT="0")


def test_works_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import fastgen, torch
from fastgen import info
x = torch.ones(2, 3)
fastgen.ops.affine_coupling(x, x, x)
assert fastgen.backends.calls() == {("affine_coupling", "cpu"): 1}
assert info.collect()["versions"]["triton"].startswith("none: ")
"""
    call(sys.executable, "-W", "error", "-c", code, cwd=tmp_path, FASTGEN_STRICT="1")


# --- wheel and sdist ---------------------------------------------------------------------------


@in_tree
@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert re.fullmatch(r"fastgen-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "fastgen").rglob("*.py")}
    expected |= {f"fastgen/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    expected |= {"fastgen/py.typed", "fastgen/_build.json", "fastgen/_C.abi3.so"}
    if _build.info()["cuda"]:
        expected.add("fastgen/_C_cuda.abi3.so")
    assert contents(wheel) == expected


@in_tree
@pytest.mark.slow
def test_wheel_leaves_the_tree_as_it_was(wheel, pure_wheel):
    assert (PACKAGE / "_C.abi3.so").exists()
    assert _build.info()["cpu"]


@in_tree
@pytest.mark.slow
def test_installed_wheel_passes_the_op_tests_outside_the_tree(wheel, install, tmp_path):
    python = install(wheel)
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    out = call(
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py"),
        *("-k", "test_opcheck or test_gradcheck"),
        cwd=tmp_path,
        FASTGEN_STRICT="1",
    )
    assert re.search(r"\d{2,} passed", out), out
    assert "failed" not in out
    kernels = "import fastgen.kernels; print(fastgen.kernels.__file__)"
    assert "site-packages/fastgen/kernels" in call(python, "-c", kernels, cwd=tmp_path)


@in_tree
@pytest.mark.slow
def test_pure_python_install_runs_every_op_by_reference(pure_wheel, install, tmp_path):
    assert re.fullmatch(r"fastgen-[\d.]+-py3-none-any\.whl", pure_wheel.name)
    assert not [name for name in contents(pure_wheel) if name.endswith(".so")]
    python = install(pure_wheel)
    code = """
import fastgen
from fastgen import backends, info, testing
for case in testing.CASES:
    testing.run(case, case.sample(case.shapes[0]))
ran = backends.calls()
assert {op for op, _ in ran} == set(backends.ops()), ran
assert {backend for _, backend in ran} == {"reference"}, ran
info.main([])
"""
    out = call(python, "-W", "error", "-c", code, cwd=tmp_path, FASTGEN_STRICT="1")
    assert "left out by FASTGEN_CPU=0" in out
    assert "left out by FASTGEN_CUDA=0" in out


@in_tree
@pytest.mark.slow
def test_sdist_can_be_built_from(tmp_path):
    call(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("csrc", "kernels", "fastgen")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
    sources = {
        str(p.relative_to(ROOT))
        for p in files
        if p.suffix not in (".so", ".pyc") and p.name != "_build.json"
    }
    assert sources <= names, sources - names
    assert {"setup.py", "pyproject.toml", "README.md"} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc", "_build.json"))]
