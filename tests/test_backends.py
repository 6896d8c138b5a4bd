"""Which backend runs: how it is chosen, what is said of the others, what cannot be forced."""

import logging
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import fastgen
from fastgen import backends, ops


@pytest.fixture(autouse=True)
def _fresh():
    """Default choice and zeroed counters, whatever the environment says."""
    with backends.use_backend(None):
        backends.reset_calls()
        yield
    backends.reset_calls()


@pytest.fixture
def double():
    """An op "double" (2 * x) with one backend of every kind; gone after the test."""

    def prepare(x):
        return (x,)

    def run(x):
        return 2 * x

    op = backends.Op("double", prepare)
    op.implement("cuda", run, device="cuda")
    op.implement("triton", run, unavailable="triton is not installed")
    op.implement("cpu", run, unsupported=lambda x: "odd size" if x.numel() % 2 else None)
    op.implement("reference", run)
    yield op
    del backends._ops["double"]


def coupling(backend=None):
    x = torch.ones(2, 4)
    return ops.affine_coupling(x, x, x, backend=backend)


def which():
    """The backend that ran for one call of affine_coupling."""
    backends.reset_calls()
    coupling()
    ((_, name),) = backends.calls()
    return name


def in_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


# --- use_backend -------------------------------------------------------------------------------


def test_as_a_setter():
    assert which() == "cpu"
    fastgen.use_backend("reference")
    assert which() == "reference"
    fastgen.use_backend(None)
    assert which() == "cpu"


def test_as_a_context_manager():
    with fastgen.use_backend("reference"):
        assert which() == "reference"
    assert which() == "cpu"


def test_mapping_leaves_the_other_ops_alone(double):
    x = torch.ones(2)
    with fastgen.use_backend({"double": "reference"}):
        assert double.select((x,)) == "reference"
        assert which() == "cpu"
    assert double.select((x,)) == "cpu"


def test_mapping_inside_a_choice_for_all(double):
    x = torch.ones(2)
    with fastgen.use_backend("reference"):
        with fastgen.use_backend({"double": "cpu"}):
            assert double.select((x,)) == "cpu"
            assert which() == "reference"
            with fastgen.use_backend(None):
                assert which() == "cpu"
            assert which() == "reference"
        assert double.select((x,)) == "reference"


def test_an_empty_mapping_changes_nothing(double):
    x = torch.ones(2)
    with fastgen.use_backend("reference"), fastgen.use_backend({"double": "cpu"}):
        with fastgen.use_backend({}):
            assert (which(), double.select((x,))) == ("reference", "cpu")
        fastgen.use_backend({})
        assert (which(), double.select((x,))) == ("reference", "cpu")
    assert which() == "cpu"


def test_restored_after_an_exception():
    with pytest.raises(KeyError), fastgen.use_backend("reference"):
        raise KeyError
    assert which() == "cpu"


def test_the_call_wins():
    with fastgen.use_backend("reference"):
        coupling(backend="cpu")
    assert backends.calls() == {("affine_coupling", "cpu"): 1}


@pytest.mark.parametrize(
    "choice, error, message",
    [
        ("gpu", ValueError, "backend: expected one of cuda, triton, cpu, reference; got 'gpu'"),
        ({"affine_coupling": "fast"}, ValueError, "backend: expected one of .*; got 'fast'"),
        (
            {"no_such_op": "cpu"},
            ValueError,
            "op: expected one of .*affine_coupling.*; got 'no_such_op'",
        ),
        (7, TypeError, "choice: expected a backend name, a mapping or None, got int"),
    ],
)
def test_unknown_choices_change_nothing(choice, error, message):
    with pytest.raises(error, match=message):
        fastgen.use_backend(choice)
    assert which() == "cpu"


def test_inside_torch_compile():
    """The choice is guarded on: a change recompiles, and the context manager may be traced."""
    torch._dynamo.reset()
    chosen = []
    op = backends.ops()["affine_coupling"]
    original = op.implementations["reference"]

    def spy(*args):
        chosen.append("reference")
        return original.function(*args)

    op.implement("reference", spy)
    try:
        compiled = torch.compile(coupling, fullgraph=True, backend="eager")
        compiled()
        assert chosen == []
        with fastgen.use_backend("reference"):
            compiled()
        assert chosen == ["reference"]
        compiled()
        assert chosen == ["reference"]
    finally:
        op.implementations["reference"] = original

    def inside(x):
        with fastgen.use_backend("reference"):
            return ops.affine_coupling(x, x, x)[0]

    x = torch.ones(2, 4)
    graph = torch.export.export(_Wrap(inside), (x,)).graph_module.code
    assert "fastgen" not in graph
    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend="eager")(x), inside(x))
    assert which() == "cpu"


class _Wrap(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# --- FASTGEN_BACKEND ---------------------------------------------------------------------------

REPORT = """
    import torch
    from fastgen import backends, ops
    x = torch.ones(2, 4)
    ops.affine_coupling(x, x, x)
    ops.normal(torch.tensor([1, 0]), (4,))
    print(sorted(backends.calls()))
"""


@pytest.mark.parametrize(
    "value, coupling_runs, normal_runs",
    [
        ("", "cpu", "cpu"),
        ("reference", "reference", "reference"),
        (" affine_coupling = reference ", "reference", "cpu"),
        ("affine_coupling=cpu,normal=reference", "cpu", "reference"),
    ],
)
def test_environment_variable(value, coupling_runs, normal_runs):
    done = in_new_process(REPORT, FASTGEN_BACKEND=value)
    assert done.returncode == 0, done.stderr
    expected = [("affine_coupling", coupling_runs), ("normal", normal_runs)]
    assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    "value, message",
    [
        ("gpu", "FASTGEN_BACKEND='gpu': backend: expected one of .*; got 'gpu'"),
        ("no_such_op=cpu", "FASTGEN_BACKEND.*no_such_op"),
        ("affine_coupling=", "FASTGEN_BACKEND='affine_coupling=': backend: .* got ''"),
        ("affine_coupling=cpu,", "FASTGEN_BACKEND='affine_coupling=cpu,': backend: .* got ''"),
    ],
)
def test_wrong_environment_variable_stops_the_import(value, message):
    done = in_new_process("import fastgen", FASTGEN_BACKEND=value)
    assert done.returncode != 0
    assert re.search("ValueError: " + message, done.stderr), done.stderr


def test_use_backend_wins_over_the_environment():
    code = REPORT.replace("x = torch", "backends.use_backend('cpu'); x = torch")
    done = in_new_process(code, FASTGEN_BACKEND="reference")
    assert done.stdout.strip() == "[('affine_coupling', 'cpu'), ('normal', 'cpu')]", done.stderr


# --- explain -----------------------------------------------------------------------------------


def test_explain_gives_a_reason_for_every_backend_ahead(double):
    found = fastgen.explain("double", torch.ones(3))
    assert found.chosen == "reference"
    assert found.rejected == {
        "cuda": "runs on cuda, the input is on cpu",
        "triton": "triton is not installed",
        "cpu": "odd size",
    }
    assert str(found).splitlines()[0] == "double: reference"
    assert "  not cpu: odd size" in str(found).splitlines()


def test_explain_stops_at_the_chosen_one(double):
    found = fastgen.explain("double", torch.ones(2))
    assert found.chosen == "cpu"
    assert list(found.rejected) == ["cuda", "triton"]


def test_explain_of_a_forced_backend(double):
    found = fastgen.explain("double", torch.ones(2), backend="reference")
    assert found.chosen == "reference"
    assert found.rejected["cpu"] == "'reference' was asked for"
    assert found.rejected["triton"] == "triton is not installed"


def test_explain_runs_nothing_and_counts_nothing():
    x = torch.ones(2, 4)
    assert fastgen.explain("affine_coupling", x, x, x, scale="exp").chosen == "cpu"
    assert backends.calls() == {}


def test_explain_checks_its_arguments():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"op: expected one of .*; got 'couplng'"):
        fastgen.explain("couplng", x)
    with pytest.raises(ValueError, match=r"scale: expected one of"):
        fastgen.explain("affine_coupling", x, x, x, scale="linear")


# --- what cannot run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, size, reason",
    [
        ("cuda", 2, "runs on cuda, the input is on cpu"),
        ("triton", 2, "triton is not installed"),
        ("cpu", 3, "odd size"),
    ],
)
def test_forced_backend_that_cannot_run_raises_with_its_reason(double, backend, size, reason):
    message = f"double: backend '{backend}' was asked for, but {reason}"
    with pytest.raises(RuntimeError, match=message):
        double((torch.ones(size),), backend)
    with fastgen.use_backend(backend), pytest.raises(RuntimeError, match=message):
        double((torch.ones(size),))
    assert backends.calls() == {}


def test_backend_that_the_op_lacks_is_named():
    with pytest.raises(ValueError, match="backend: affine_coupling has .*reference; got 'gpu'"):
        coupling(backend="gpu")


def test_op_without_a_fitting_backend(double):
    del double.implementations["reference"]
    with pytest.raises(RuntimeError, match="double: no backend takes these inputs"):
        double((torch.ones(3),))


# --- what is visible ---------------------------------------------------------------------------


def test_counters():
    coupling()
    coupling()
    coupling("reference")
    counted = backends.calls()
    assert counted == {("affine_coupling", "cpu"): 2, ("affine_coupling", "reference"): 1}
    counted.clear()
    assert backends.calls() != {}
    backends.reset_calls()
    assert backends.calls() == {}


def test_each_reason_is_logged_once_at_debug(double, caplog, monkeypatch):
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level(logging.DEBUG, "fastgen"):
        for size in 3, 3, 5:
            double((torch.ones(size),))
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "fastgen"]
    assert lines == [
        ("DEBUG", "double: not cuda: runs on cuda, the input is on cpu"),
        ("DEBUG", "double: not triton: triton is not installed"),
        ("DEBUG", "double: not cpu: odd size"),
    ]
