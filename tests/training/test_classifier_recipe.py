"""The classifier learns, and judges samples by its features."""

import json
from pathlib import Path

import pytest
import torch

from fastgen.cli import main
from fastgen.data import load_images
from fastgen.training.options import parse_train_options
from fastgen.training.runs import load_run, sample_quality, start_run
from fastgen.training.tasks.base import Task


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    options = ["--classifier.steps=300", "--engine.cpu=true", "--model.channels=16"]
    config = parse_train_options("classifier", options).config
    return start_run("classifier", config, tmp_path_factory.mktemp("classifier") / "run").path


class Copies(Task):
    """Draws images that it was given."""

    def __init__(self, images):
        self.images = images
        self.modules = {"none": torch.nn.Linear(1, 1)}
        self.stages = []
        self.drawn = 0

    def sample(self, num, *, labels, temperature, generator):
        start, self.drawn = self.drawn, self.drawn + num
        return self.images[start : start + num]

    def evaluate(self):
        return {}


def test_it_learns(judge, capsys):
    assert main(["eval", str(judge)]) == 0
    measures = json.loads((judge / "eval.json").read_text())
    assert measures["test"]["accuracy"] > 0.93 and measures["test"]["cross_entropy"] < 0.3
    assert f"{measures['test']['accuracy']:.5g}" in capsys.readouterr().out


def test_real_images_are_judged_better_than_blurred_ones_and_those_than_noise(judge):
    digits, task = load_images("digits"), load_run(judge)
    real = digits.train.images[:700]
    blurred = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
    noise = real.flatten(1)[:, torch.randperm(64)].view_as(real)
    found = [sample_quality(Copies(images), task, 700) for images in (real, blurred, noise)]
    assert found[0]["frechet_distance"] < 0.3 * found[1]["frechet_distance"]
    assert found[1]["frechet_distance"] < found[2]["frechet_distance"]
    for name in ("precision", "recall", "density", "coverage"):
        assert found[0][name] > 0.8 and found[0][name] > 1.3 * found[2][name]
    one_class = sample_quality(Copies(digits.train.images[digits.train.labels == 3]), task, 120)
    assert one_class["precision"] > 0.8 and one_class["coverage"] < 0.25


def test_eval_with_features(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = ["--vae.steps=5", "--engine.cpu=true", "--evaluation.samples=10"]
    assert main(["train", "vae", *train, "--run-dir", "run"]) == 0
    capsys.readouterr()
    arguments = ["--features", str(judge), "--num", "600", "--evaluation.samples=20"]
    assert main(["eval", "run", *arguments, "--evaluation.splits=[valid]"]) == 0
    measures = json.loads((tmp_path / "run/eval.json").read_text())
    assert measures["valid"]["samples"] == 20 and "nll" not in measures["test"]
    assert measures["test"]["frechet_distance"] > 0 and measures["test"]["coverage"] <= 1
    assert "frechet_distance" in capsys.readouterr().out
    assert main(["eval", "run", "--features", "run"]) == 2
    assert "must be those of a run of recipe 'classifier'" in capsys.readouterr().err


def test_what_cannot_be(judge, tmp_path, capsys):
    assert main(["sample", str(judge)]) == 2
    assert "a classifier draws no images" in capsys.readouterr().err
    assert main(["eval", str(judge), "--features", str(judge)]) == 2
    assert "a classifier draws no images" in capsys.readouterr().err
    images = torch.zeros(30, 4, 4).numpy()
    import numpy as np

    np.savez(tmp_path / "x.npz", images=images)
    arguments = ["--data", str(tmp_path / "x.npz"), "--run-dir", str(tmp_path / "r")]
    assert main(["train", "classifier", *arguments]) == 2
    assert "has no labels to learn" in capsys.readouterr().err
