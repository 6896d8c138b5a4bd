"""Against a network in the place of torchvision's, which no test fetches."""

import sys
import types

import pytest
import torch
from torch import nn

from fastgen.metrics import InceptionFeatures


class Network(nn.Module):
    """Channel means, and what it was given."""

    def __init__(self):
        super().__init__()
        self.transform_input = True
        self.fc = nn.Linear(3, 1000)
        self.seen = None

    def forward(self, images):
        assert not self.training and not self.transform_input
        self.seen = images
        return self.fc(images.mean((2, 3)))


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose Inception is `Network`; its attribute `fails` is raised instead."""
    models = types.ModuleType("torchvision.models")
    models.fails = None

    def inception_v3(weights):
        assert weights == "IMAGENET1K_V1"
        if models.fails is not None:
            raise models.fails
        return Network()

    models.inception_v3 = inception_v3
    package = types.ModuleType("torchvision")
    package.__spec__ = types.SimpleNamespace(name="torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return models


def test_images_come_as_the_network_wants_them(torchvision):
    features = InceptionFeatures()
    grey = torch.rand(2, 1, 8, 8)
    found = features(grey)
    seen = features.network.seen
    assert seen.shape == (2, 3, 299, 299) and torch.equal(seen[:, 0], seen[:, 2])
    assert seen.min() >= -1 and seen.max() <= 1 and seen.min() < -0.5 and seen.max() > 0.5
    torch.testing.assert_close(found, seen.mean((2, 3)))
    colour = torch.zeros(1, 3, 5, 7)
    colour[:, 1] = 1
    torch.testing.assert_close(features(colour), torch.tensor([[-1.0, 1.0, -1.0]]))
    assert not any(p.requires_grad for p in features.parameters())
    with pytest.raises(ValueError, match=r"images must be \(N, 1 or 3, H, W\), got \(2, 2, 8, 8\)"):
        features(torch.rand(2, 2, 8, 8))


def test_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="need torchvision: pip install torchvision"):
        InceptionFeatures()


def test_no_weights(torchvision):
    torchvision.fails = OSError("no route to host")
    with pytest.raises(ValueError, match="weights cannot be fetched: no route to host"):
        InceptionFeatures()


def test_eval_by_inception(torchvision, tmp_path, monkeypatch, capsys):
    """Samples of a run against its own test images."""
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    from fastgen.cli import main

    monkeypatch.chdir(tmp_path)
    steps = ["--autoencoder.steps=2", "--prior.steps=2", "--engine.cpu=true"]
    assert main(["train", "vqvae", *steps, "--run-dir", "run"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--features", "inception", "--num", "20"]) == 0
    assert "frechet_distance" in capsys.readouterr().out
    torchvision.fails = OSError("no route to host")
    assert main(["eval", "run", "--features", "inception"]) == 2
    assert "weights cannot be fetched" in capsys.readouterr().err
    steps = ["--data=moons", "--flow.steps=2", "--engine.cpu=true"]
    assert main(["train", "realnvp", *steps, "--run-dir", "flow"]) == 0
    torchvision.fails = None
    assert main(["eval", "flow", "--features", "inception"]) == 2
    assert "features are of images, and the run has none" in capsys.readouterr().err
