"""The recipe learns; fused ops and references train alike; bad options stop before training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastgen
from fastgen.cli import main
from fastgen.data import ImageDataset, ImageSplit, load_images
from fastgen.training import checkpoint as ckpt
from fastgen.training.errors import RunError
from fastgen.training.options import parse_train_options
from fastgen.training.runs import evaluate_run, load_run, sample_run, start_run
from fastgen.training.tasks.stylegan import StyleGANConfig, StyleGANTask

CONFIGS = Path(__file__).parents[2] / "docs" / "configs"


def options(*extra):
    return parse_train_options("stylegan", ["--data=digits", "--engine.cpu=true", *extra]).config


TINY = [
    "--model.latent_dim=8",
    "--model.mapping_layers=2",
    "--model.channel_base=64",
    "--model.channel_max=8",
    "--growth.batch_size=[8]",
    "--engine.log_every=1",
    "--engine.valid_every=100",
    "--engine.sample_every=100",
]


def tiny(steps, *extra):
    return options(*TINY, f"--growth.steps={steps}", *extra)


def lines(run, split):
    records = map(json.loads, run.metrics_path.read_text().splitlines())
    return [r for r in records if r["split"] == split]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    config = options("--growth.steps=[60,300]", "--model.channel_max=24", "--engine.valid_every=60")
    return start_run("stylegan", config, tmp_path_factory.mktemp("stylegan") / "run")


def test_samples_come_near_the_data(run):
    valid = lines(run, "valid")
    assert [r["stage"] for r in valid][:3] == ["4x4", "4x4", "8x8"]
    assert valid[-1]["frechet_8x8"] < 0.6 * valid[0]["frechet_8x8"]
    alphas = [r["alpha"] for r in lines(run, "train") if r["stage"] == "8x8"]
    assert alphas == sorted(alphas) and alphas[0] < 0.5 and alphas[-1] == 1


def test_growing_does_not_change_what_is_drawn(run):
    """A level begins with the images of the one below it, for both networks."""
    before, after = [r for r in lines(run, "valid") if r["step"] == 60]
    assert (before["stage"], after["stage"]) == ("4x4", "8x8")
    for name in ("score", "score_train", "score_samples", "frechet_8x8"):
        assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-4)


def test_pictures_and_evaluation(run):
    for name in ("samples", "truncated", "mixing"):
        path = run.samples / f"step-00000360-{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
    measures = evaluate_run(run.path)
    assert measures.keys() == {"valid", "test"} and evaluate_run(run.path) == measures
    task = load_run(run.path)
    assert task.generator.growth.tolist() == [1.0, 1.0]
    assert task.generator.w_mean.abs().max() > 0
    spread = [sample_run(run.path, 40, temperature=t).var(0).mean() for t in (1.0, 0.3)]
    assert spread[1] < 0.8 * spread[0]
    assert sample_run(run.path, 3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(("loss", "rate"), [("nonsaturating-r1", 1e-3), ("wgan-gp", 3e-4)])
def test_thirty_steps_are_the_same_with_the_references(tmp_path, loss, rate):
    """The same seed gives the same keys: noise, data and weights are the same.

    Adam without momentum moves a weight by the whole rate wherever rounding turns the sign of its
    gradient, and the Wasserstein loss has more of those near zero.
    """
    torch.set_num_threads(1)
    arguments = [f"--objective.loss={loss}", "--objective.mirror=true", f"--optimizer.lr={rate}"]
    config = tiny("[10,20]", *arguments)
    terms = []
    for backend in (None, "reference"):
        with fastgen.use_backend(backend):
            run = start_run("stylegan", config, tmp_path / str(backend))
        names = ("discriminator_loss", "generator_loss", "penalty")
        terms.append([[r[name] for name in names] for r in lines(run, "train")])
    assert len(terms[0]) == 30
    for fused, reference in zip(*terms, strict=True):
        assert fused == pytest.approx(reference, rel=1e-4, abs=1e-5)
    assert terms[0][0] != terms[0][-1]


def test_a_checkpoint_within_a_fade_draws_there(tmp_path):
    config = tiny("[2,8]", "--growth.fade=0.75", "--engine.checkpoint_every=5")
    run = start_run("stylegan", config, tmp_path / "run")
    first, last = ckpt.list_checkpoints(run.checkpoints)
    assert ckpt.load_checkpoint(first)["averages"].keys() == {"generator"}
    shutil.rmtree(last)
    growth = load_run(run.path).generator.growth
    assert growth[0] == 1 and 0 < growth[1] < 1


def test_only_what_is_in_use_trains(tmp_path):
    config = tiny("[2,2,2]", "--model.resolution=16")
    task = StyleGANTask(config, load_images("digits"))
    stage = task.stages[1]
    stage.optimizers()
    for module, lists in (
        (task.generator, ("to_image", "blocks")),
        (task.discriminator, ("from_image", "blocks")),
    ):
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        images, blocks = (
            {int(n.split(".")[1]) for n in trained if n.startswith(name)} for name in lists
        )
        assert images == {0, 1} and blocks in ({0, 1}, {0})


def test_borders_and_levels():
    images = torch.rand(20, 1, 6, 5)
    split = ImageSplit(images)
    config = tiny("[2,2]")
    task = StyleGANTask(config, ImageDataset("x", split, split, split))
    top = task.at_level(images, 1)
    assert top.shape == (20, 1, 8, 8)
    assert torch.equal(top[:, :, 1:7, 1:6], images) and top.sum() == images.sum()
    torch.testing.assert_close(task.at_level(images, 0), F.avg_pool2d(top, 2))
    shape = task.sample(2, labels=None, temperature=1, generator=torch.Generator()).shape
    assert shape == (2, 1, 6, 5)
    task.generator.grow(0, 1.0)
    shape = task.sample(2, labels=None, temperature=1, generator=torch.Generator()).shape
    assert shape == (2, 1, 6, 5)


def test_penalties_left_out_weigh_more(tmp_path):
    config = tiny("[6,0]", "--objective.penalty_every=3")
    penalties = [
        r["penalty"] for r in lines(start_run("stylegan", config, tmp_path / "a"), "train")
    ]
    assert [p > 0 for p in penalties] == [True, False, False] * 2
    every = start_run("stylegan", tiny("[1,0]"), tmp_path / "b")
    assert penalties[0] == pytest.approx(3 * lines(every, "train")[0]["penalty"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective.gamma=-1"], "objective.gamma must be a number in [0, 1000000], got -1"),
        (["--objective.mixing=2"], "objective.mixing must be a number in [0, 1], got 2"),
        (["--objective.penalty_every=0"], "objective.penalty_every must be an integer in [1, "),
        (["--objective.loss=hinge"], "objective.loss"),
        (["--growth.fade=1"], "growth.fade must be a number in [0, 1), got 1"),
        (["--growth.steps=[3]"], "growth.steps must be 2 numbers, one for each side from 4 to 8"),
        (["--growth.steps=[3,-1]"], "growth.steps must be a list [...], each an integer in [0, "),
        (["--growth.batch_size=[1,2,3]"], "growth.batch_size must be one number, or 2"),
        (["--growth.batch_size=[6]"], "must be a multiple of model.group_size, got 6 and 4"),
        (["--growth.batch_size=[9996]"], "batch_size must be in [1, 1439], got 9996"),
        (["--growth.start=16"], "growth.start must be at most model.resolution, 8, got 16"),
        (["--growth.start=12"], "resolution must be a power of two, at least 4, got 12"),
        (["--model.resolution=4"], "model.resolution must be at least the side of the images, 8"),
        (["--model.latent_dim=0"], "model.latent_dim must be an integer in [1, 4096], got 0"),
        (["--engine.compile=true"], "engine.compile must be false: the penalties are of second"),
    ],
)
def test_bad_options_stop_before_training(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "stylegan", "--data=digits", "--engine.cpu=true", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_labels_and_psi_are_checked(run):
    with pytest.raises(RunError, match="this generator has no classes"):
        sample_run(run.path, 2, label=1)
    with pytest.raises(RunError, match=r"temperature must be a number in \[0, 1000\], got -1"):
        sample_run(run.path, 2, temperature=-1)


def test_the_gpu_configuration_fits_a_folder_of_images():
    config = parse_train_options(
        "stylegan", ["--config", str(CONFIGS / "stylegan-128.yaml"), "--data", "photos"]
    ).config
    assert isinstance(config, StyleGANConfig) and config.model.resolution == 128
    split = ImageSplit(torch.rand(64, 3, 128, 128))
    task = StyleGANTask(config, ImageDataset("photos", split, split, split))
    assert [stage.name for stage in task.stages] == ["8x8", "16x16", "32x32", "64x64", "128x128"]
    assert all(stage.config.steps * stage.config.batch_size > 1e6 for stage in task.stages[1:])
