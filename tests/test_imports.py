"""Imports run one way only, heavy libraries stay out of `import fastgen`, nothing is unpickled."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastgen

PACKAGE = Path(fastgen.__file__).parent
KERNELS = PACKAGE.parent / "kernels" if not (PACKAGE / "kernels").exists() else PACKAGE / "kernels"
FILES = sorted(PACKAGE.rglob("*.py"))

#: The parts of the package, lowest first; a module may import from its own line and those above it.
LAYERS = (
    ("_build", "_interrupt", "backends", "memory", "random", "kernels"),
    ("ops",),
    ("nn",),
    ("losses", "data", "metrics"),
    ("models", "integrations"),
    ("training",),
    ("testing", "info", "demo", "cli", "__main__", "__init__"),
)
#: Inside a function: fills the table of ops when someone asks for it.
EXCEPTIONS = {("backends.py", "ops")}

HEAVY = ("accelerate", "jsonargparse", "matplotlib", "triton", "sklearn", "tensorboard", "PIL")
PICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imported(tree):
    """Absolute dotted names that a module imports, those in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts(tree):
    """The parts of fastgen that a module imports from."""
    names = {name.split(".")[1] for name in imported(tree) if name.startswith("fastgen.")}
    return {name for name in names if any(name in layer for layer in LAYERS)}


def rank(part):
    found = [i for i, layer in enumerate(LAYERS) if part in layer]
    assert found, f"fastgen/{part} has no place in LAYERS of tests/test_imports.py"
    return found[0]


def each_file(files):
    return pytest.mark.parametrize("path", files, ids=lambda p: str(p.relative_to(PACKAGE.parent)))


@each_file(FILES)
def test_imports_run_one_way(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for part in parts(parse(path)):
        if (str(relative), part) not in EXCEPTIONS:
            assert rank(part) <= rank(own), f"{relative} imports from fastgen.{part}"


@each_file(sorted(KERNELS.rglob("*.py")))
def test_kernels_import_torch_and_triton_alone(path):
    for name in imported(parse(path)):
        top = name.split(".")[0]
        allowed = top in ("torch", "triton") or top in sys.stdlib_module_names
        assert allowed or name.startswith("fastgen.kernels"), f"{path.name} imports {name}"


@each_file(FILES)
def test_kernels_and_compiled_modules_are_reached_lazily(path):
    """At the top of a module they would be loaded, or fail, with `import fastgen`."""
    for node in parse(path).body:
        for name in imported(ast.Module([node], [])) if not _defines(node) else ():
            assert not name.startswith(("fastgen.kernels", "fastgen._C", "triton")), name


def _defines(node):
    return isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))


@each_file([p for p in FILES if p.relative_to(PACKAGE).parts[0] in ("nn", "models", "training")])
def test_layers_and_models_call_public_ops_only(path):
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "ops":
            owner = node.value
            assert not (isinstance(owner, ast.Name) and owner.id == "torch"), (
                f"{path.name}:{node.lineno} uses torch.ops"
            )
    for name in imported(tree):
        assert not name.startswith(("torch.ops", "triton", "fastgen.kernels", "fastgen._C")), name


@each_file(FILES)
def test_nothing_is_unpickled(path):
    tree = parse(path)
    for name in imported(tree):
        assert name.split(".")[0] not in PICKLERS, f"{path.name} imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        where = f"{path.name}:{node.lineno}"
        assert options.get("allow_pickle") in (None, False), f"{where} allows pickles"
        if ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
            assert options.get("weights_only") is True, f"{where} loads without weights_only=True"


def test_the_checks_see_what_they_look_for():
    """Each rule on a line that breaks it: a rule that sees nothing would pass for ever."""
    tree = ast.parse("def f():\n    from fastgen import training\n    import pickle as p")
    assert parts(tree) == {"training"}
    assert "pickle" in set(imported(tree))
    assert rank("training") > rank("ops")
    with pytest.raises(AssertionError, match="no place in LAYERS"):
        rank("utilities")
    with pytest.raises(AssertionError, match="relative import"):
        list(imported(ast.parse("from . import x")))


IMPORT = f"""
import sys
import torch
before = set(sys.modules)
import fastgen
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({HEAVY!r})))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
