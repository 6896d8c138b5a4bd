"""The benchmark of training steps: what it times, compares, keeps and refuses; never a time."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgen import backends
from fastgen.models import RealNVP

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.integrations import run as integrations  # noqa: E402
from benchmarks.models import run  # noqa: E402
from benchmarks.models.case import (  # noqa: E402
    STEP,
    ModelCase,
    Peer,
    Training,
    make_step,
    run_model,
    seeded,
)


def small() -> Training:
    model = RealNVP(2, layers=2, hidden=4, blocks=1)
    return Training(model, (torch.randn(8, 2),), lambda x: -model(x).mean())


def other(ours: Training) -> Training:
    """A peer that does the same without ops of fastgen."""
    linear = nn.Linear(1, 1)
    nn.init.zeros_(linear.weight)
    linear.bias.data.fill_(ours.loss().item())
    return Training(linear, (torch.zeros(1, 1),), lambda x: linear(x).sum())


def missing(ours: Training) -> Training:
    raise ModuleNotFoundError("No module named 'nolib'", name="nolib")


def case(peers=None, **changes) -> ModelCase:
    return replace(ModelCase("toy", "2", small, peers or {}, compiled=False), **changes)


def test_the_providers_that_make_sense():
    assert [t.provider for t in run_model(case(ours=("fastgen",)), budget=0)] == ["fastgen"]


def test_every_provider_once():
    peers = {"torch": Peer(other, "torch", 1e-5), "nolib": Peer(missing, "nolib")}
    found = {t.provider: t for t in run_model(case(peers), budget=0)}
    assert list(found) == ["nolib", "fastgen", "reference", "torch"]
    assert found["nolib"].note == "not installed: nolib"
    assert found["torch"].package.startswith("torch 2.")
    for name in ("fastgen", "reference", "torch"):
        timing = found[name]
        assert timing.mode == STEP and 0 < timing.low <= timing.seconds <= timing.high


def test_wanted_providers_alone():
    peers = {"torch": Peer(other, "torch")}
    found = [t.provider for t in run_model(case(peers), budget=0, wanted={"torch"})]
    assert found == ["fastgen", "torch"]


def test_a_peer_with_another_loss_is_refused():
    def wrong(ours):
        theirs = other(ours)
        with torch.no_grad():
            theirs.model.bias.mul_(1.01)
        return theirs

    with pytest.raises(ValueError, match="toy 2: wrong has a loss of"):
        list(run_model(case({"wrong": Peer(wrong, "torch", 1e-3)}), budget=0))
    assert len(list(run_model(case({"wrong": Peer(wrong, "torch")}), budget=0))) == 3


@pytest.mark.parametrize("backend", (None, "reference"))
def test_a_step_trains_with_the_backend_it_names(backend):
    training = seeded(case())
    step = make_step(training, backend)
    before = [p.detach().clone() for p in training.model.parameters()]
    backends.reset_calls()
    step()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True)
    )
    assert {b for _, b in backends.calls()} == {"reference" if backend else "cpu"}
    step()
    assert len(backends.calls()) == 1


def test_all_start_from_the_same_weights():
    first, second = seeded(case()), seeded(case())
    assert torch.equal(first.loss(), second.loss())
    step = make_step(first)
    step()
    assert not torch.equal(first.loss(), second.loss())


def test_the_table_is_kept_and_reported(tmp_path, monkeypatch, capsys):
    peers = {"torch": Peer(other, "torch", 1e-5), "nolib": Peer(missing, "nolib")}
    monkeypatch.setattr(run, "models_in", lambda folder: ["toy"])
    monkeypatch.setattr(run, "cases_of", lambda model, folder: [case(peers), case(size="3")])
    assert run.main(["toy", "--quick", "--filter", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "x fastgen" in out and "not installed: nolib" in out
    with (tmp_path / "toy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["size"], r["provider"]) for r in rows] == [
        ("2", name) for name in ("nolib", "fastgen", "reference", "torch")
    ]
    assert report.main([str(tmp_path)]) == 0
    assert "| toy 2 | training step |" in capsys.readouterr().out


def test_bad_arguments(capsys):
    for arguments, message in (
        (["gan"], "unknown model 'gan'; expected one of realnvp"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as raised:
            run.main(arguments)
        assert raised.value.code == 2 and message in capsys.readouterr().err


def each_model(function):
    models = [
        (folder, model)
        for folder in (run.FOLDER, integrations.FOLDER)
        for model in run.models_in(folder)
    ]
    ids = [f"{folder.name}-{model}" for folder, model in models]
    return pytest.mark.parametrize(("folder", "model"), models, ids=ids)(function)


def cases(folder, model):
    try:
        return run.cases_of(model, folder)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")


@each_model
def test_cases_of_each_model(folder, model):
    found = cases(folder, model)
    assert found and len({case.size for case in found}) == len(found)
    assert all(case.op == model for case in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")  # normflows' permutations
@each_model
def test_peers_compute_what_they_claim(folder, model):
    """Each case's peers that claim to compute the same, where they are installed."""
    for case in cases(folder, model):
        exact = {name: peer for name, peer in case.peers.items() if peer.tolerance is not None}
        list(run_model(replace(case, peers=exact, compiled=False), budget=0, wanted=set(exact)))
