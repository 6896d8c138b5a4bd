"""What a user imports and reads: exported names, and the Python examples of the README."""

import importlib
import inspect
import re
import typing
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"
MODULES = ("ops", "nn", "losses", "metrics", "models", "integrations", "data", "training")


def public():
    """Dotted name -> object, for all that the packages export."""
    for module in map(importlib.import_module, ("fastgen", *(f"fastgen.{m}" for m in MODULES))):
        for name in getattr(module, "__all__", ()):
            yield f"{module.__name__}.{name}", getattr(module, name)


def functions(thing):
    """A function, or the public methods that a class defines."""
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and not name.startswith("_"):
                yield member
    elif inspect.isfunction(thing):
        yield thing


def classes(annotation):
    """The classes in a type, those inside of containers too."""
    if inspect.isclass(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from classes(argument)


def returned(function):
    """fastgen's own classes in what a function is annotated to return."""
    found = classes(typing.get_type_hints(function).get("return"))
    return {c for c in found if c.__module__.split(".")[0] == "fastgen"}


def test_what_is_returned_is_exported():
    exported = {id(thing) for _, thing in public()}
    missing = {
        f"{name}: {cls.__name__}"
        for name, thing in public()
        for function in functions(thing)
        for cls in returned(function)
        if id(cls) not in exported
    }
    assert not missing


def test_the_search_sees_returned_classes():
    from fastgen.models import VAE, Bound, Flow, RealNVP

    assert returned(VAE.elbo) == {Bound}
    assert VAE.elbo in set(functions(VAE)) and Flow.sample not in set(functions(RealNVP))


def test_readme_example_of_models():
    """Its loop, on three small batches of binary images."""
    (example,) = (e for e in examples() if "fastgen.models" in e)
    batches = [torch.rand(4, 1, 28, 28).round() for _ in range(3)]
    names = {"batches": batches}
    exec(example.replace("samples=1000", "samples=20"), names)
    assert names["samples"].shape == (64, 1, 28, 28)
    assert names["log_p"].shape == (4,) and names["loss"].isfinite()
    assert names["reconstructions"].shape == (4, 1, 28, 28)


def examples():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
