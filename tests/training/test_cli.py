"""The command line: what works; a bad request is one line, status 2, and nothing touched."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import fastgen
from fastgen.cli import main
from fastgen.training import checkpoint as ckpt
from fastgen.training.options import config_from_dict, config_to_dict, parse_train_options
from fastgen.training.stage_run import StageRun

SHORT = ["--autoencoder.steps", "2", "--prior.steps", "2", "--engine.cpu", "true"]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command line that must be refused, and return its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTGEN_DATA", raising=False)

    def run(*arguments: object, status: int = 2) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        err = capsys.readouterr().err
        assert err.startswith("fastgen: error: ") and err.count("\n") == 1, err
        assert tree(tmp_path) == before
        return err

    return run


def test_train_sample_eval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vqvae", *SHORT]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("vqvae-digits-2")
    assert capsys.readouterr().out.endswith(f"done: {run}\n")
    assert main(["sample", str(run), "--num", "3", "--seed", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "samples/sample-seed1.png")
    first = (run / "samples/sample-seed1.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert main(["sample", str(run), "--num", "3", "--seed", "1", "--out", "again.png"]) == 0
    assert (tmp_path / "again.png").read_bytes() == first
    assert main(["sample", str(run), "--num", "3", "--seed", "2", "--out", "other.png"]) == 0
    assert (tmp_path / "other.png").read_bytes() != first
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    table = capsys.readouterr().out
    measures = json.loads((run / "eval.json").read_text())
    for name in ("mse", "relative_mse", "usage", "perplexity", "nats_per_code"):
        assert f"{measures['test'][name]:.5g}" in table
    assert 0 < measures["valid"]["usage"] <= 1 <= measures["valid"]["perplexity"]


def test_the_resolved_config_repeats_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vqvae", *SHORT, "--engine.seed", "5", "--run-dir", "a"]) == 0
    assert main(["train", "vqvae", "--config", "a/config.yaml", "--run-dir", "b"]) == 0
    assert (tmp_path / "a/config.yaml").read_text() == (tmp_path / "b/config.yaml").read_text()
    a, b = (tmp_path / name / "checkpoints/step-00000004/model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_config_round_trip(config):
    recipe, again = config_from_dict(config_to_dict("vqvae", config))
    assert recipe == "vqvae" and again == config


def test_hyphens_and_presets(tmp_path):
    first = parse_train_options("vqvae", ["--data-root", "a-b", "--run-dir=x-y"])
    assert first.config.data_root == "a-b" and first.run_dir == Path("x-y")
    assert first.config.model.downsamplings == 1
    mnist = parse_train_options("vqvae", ["--data", "mnist"]).config
    assert mnist.model.downsamplings == 2
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"data": "mnist", "model": {"num_codes": 33}}))
    from_file = parse_train_options(
        "vqvae", ["--config", str(file), "--model.code_dim", "3"]
    ).config
    assert (from_file.model.num_codes, from_file.model.code_dim) == (33, 3)
    assert from_file.model.downsamplings == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown command 'fly'; known: train, sample, eval, download, bench, info"),
        (["train"], "needs a recipe first; known: "),
        (["train", "vqgan"], "unknown recipe 'vqgan'; known: "),
        (["train", "vqvae", "--model.colour", "3"], "--model.colour"),
        (["train", "vqvae", "extra"], "extra"),
        (["train", "vqvae", "--model.num_codes", "many"], "model.num_codes"),
        (["train", "vqvae", "--model.num_codes"], "--model.num_codes"),
        (["train", "vqvae", "--model.codebook", "magic"], "model.codebook"),
        (["train", "vqvae", "--model.downsamplings", "5"], "downsamplings must halve"),
        (["train", "vqvae", "--model.num_codes", "0"], "num_codes"),
        (["train", "vqvae", "--prior_model.width", "7"], "width a multiple of heads"),
        (["train", "vqvae", "--prior.batch_size", "9999"], "prior.batch_size must be in [1, 1439]"),
        (
            ["train", "vqvae", "--autoencoder.steps", "-1"],
            "autoencoder.steps must be an integer in [0, ",
        ),
        (["train", "vqvae", "--engine.accumulate", "3"], "multiple of engine.accumulate"),
        (
            ["train", "vqvae", "--engine.log_every", "0"],
            "engine.log_every must be an integer in",
        ),
        (
            ["train", "vqvae", "--data", "cats"],
            "data set 'cats' is not known; known: digits, mnist",
        ),
        (["train", "vqvae", "--data", "mnist"], "no data folder is set; give --data-root DIR"),
        (["train", "vqvae", "--data", "mnist", "--data-root", "nowhere"], "not found in"),
        (["train", "vqvae", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", "nowhere"], "is not a run folder: it has no config.yaml"),
        (["sample"], "required: run"),
        (["sample", "nowhere"], "is not a run folder"),
        (["sample", "nowhere", "--num", "0"], "num must be an integer in [1, 1000000], got 0"),
        (["eval", "nowhere"], "is not a run folder"),
        (["eval", "nowhere", "--fast"], "unrecognized arguments: --fast"),
        (
            ["eval", "nowhere", "--evaluation.samples"],
            "--evaluation.samples: expected one argument",
        ),
        (["eval", "nowhere", "--evaluation.samples", "--num", "3"], "expected one argument"),
        (["train", "vqvae", "--model.num", "3"], "unrecognized arguments: --model.num 3"),
        (["train", "vqvae", "--engine.log=3"], "unrecognized arguments: --engine.log=3"),
        (["train", "--resume", "x", "--data-r", "y"], "unrecognized arguments: --data-r"),
        (["train", "--res", "x"], "needs a recipe first"),
        (["sample", "x", "--nu", "3"], "unrecognized arguments: --nu 3; see fastgen sample --help"),
        (["eval", "x", "--feat", "y"], "unrecognized arguments: --feat y; see fastgen eval --help"),
        (["download", "mnist", "--data-r", "y"], "unrecognized arguments: --data-r y"),
        (["info", "--js"], "unrecognized arguments: --js; see fastgen info --help"),
        (["bench", "--qui"], "unrecognized arguments: --qui; see fastgen bench --help"),
        (["bench", "adian"], "unknown op 'adian'"),
        (["sample", "x", "--out", "x.jpg"], "--out must be the name of a .png file, got x.jpg"),
        (["sample", "x", "--out", ""], "--out must be the name of a .png file"),
    ],
)
def test_bad_requests(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize("options", [["--model.colour", "3"], ["--engine.seed", "x"], ["--data"]])
def test_a_bad_option_points_to_the_page_that_lists_the_options(refused, capsys, options):
    line = refused("train", "vae", *options)
    assert line.endswith("; see fastgen train vae --help\n")
    assert main(["train", "vae", "--help"]) == 0
    assert "--engine.seed" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["model: {colour: 3}", "a: [", "- 1", "recipe: other", "\0"])
def test_bad_config_files(refused, tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    refused("train", "vqvae", "--config", "bad.yaml")


def test_a_folder_in_use_is_not_touched(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all I have")
    assert "--resume" in refused("train", "vqvae", "--run-dir", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    assert "exists" in refused("train", "vqvae", "--run-dir", tmp_path / "file")


def test_an_unwritable_run_folder(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    line = refused("train", "vqvae", "--run-dir", tmp_path / "file" / "run")
    assert "cannot write the run folder" in line and "--run-dir" in line


def test_options_with_resume_are_refused(refused, run_copy):
    assert "unrecognized" in refused("train", "--resume", run_copy, "--model.num_codes", "3")
    assert "is a run of recipe 'vqvae'" in refused("train", "gan", "--resume", run_copy)


@pytest.mark.parametrize("command", [["train", "--resume"], ["sample"], ["eval"]])
def test_truncated_checkpoints(refused, run_copy, command):
    for path in ckpt.list_checkpoints(run_copy / "checkpoints"):
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    (run_copy / ".lock").touch()
    line = refused(*command, run_copy)
    assert "no sound checkpoint" in line and "model.safetensors is damaged" in line


def test_a_truncated_newest_checkpoint_is_warned_of(run_copy, capsys):
    newest = ckpt.list_checkpoints(run_copy / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"")
    assert main(["eval", str(run_copy)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("warning: ") and "model.safetensors is damaged" in out.splitlines()[0]


@pytest.mark.parametrize("text", ["", "recipe: gan", "recipe: vqvae\nmodel: 3", "{", "recipe: [1]"])
def test_a_damaged_run_config(refused, run_copy, text):
    (run_copy / "config.yaml").write_text(text)
    for command in (["train", "--resume"], ["sample"], ["eval"]):
        refused(*command, run_copy)


def test_a_checkpoint_of_another_model(refused, run_copy):
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config["model"]["num_codes"] = 17
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert "does not fit the configured model" in refused("sample", run_copy)


def test_sampling_what_there_is_not(refused, run_copy):
    assert "labels must be in [0, 10)" in refused("sample", run_copy, "--label", "10")
    assert "temperature must be positive" in refused("sample", run_copy, "--temperature", "0")
    line = refused("sample", run_copy, "--num", "1", "--out", run_copy / "none" / "x.png")
    assert "cannot write" in line and "--out" in line


def test_a_picture_replaces_pictures_of_fastgen_alone(refused, run_copy):
    """Nothing of the run, no folder, and no picture that something else made."""
    arguments = ["sample", run_copy, "--num", "1", "--out"]
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        assert "must be the name of a .png file" in refused(*arguments, run_copy / name)
    other = run_copy / "other.png"
    Image.new("L", (4, 4)).save(other)
    (run_copy / "folder.png").mkdir()
    (run_copy / "text.PNG").write_text("all I have")
    (run_copy / "lost.png").symlink_to("nowhere")
    os.mkfifo(run_copy / "pipe.png")
    for name in ("other.png", "folder.png", "text.PNG", "lost.png", "pipe.png"):
        assert "is no picture of fastgen's" in refused(*arguments, run_copy / name)
    (run_copy / "pipe.png").unlink()
    own = run_copy / "own.png"
    for _ in range(2):
        assert main([*map(str, arguments), str(own)]) == 0
    drawn = next((run_copy / "samples").glob("*.png"))
    assert main([*map(str, arguments), str(drawn)]) == 0
    assert drawn.read_bytes() == own.read_bytes()


def test_options_of_the_evaluation_with_a_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--vae.steps=1", "--model.width=16", "--engine.cpu=true", "--run-dir=run"]
    assert main(["train", "vae", *short]) == 0
    for arguments in (["--evaluation.samples", "5", "run"], ["run", "--evaluation.samples=5"]):
        assert main(["eval", *arguments, "--evaluation.images", "20"]) == 0
        assert json.loads(Path("run/eval.json").read_text())["test"]["samples"] == 5


#: Also where the tests run in the background, as shells start it: there Ctrl-C is ignored.
INTERRUPT = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize("module", ["torch", "accelerate"])
@pytest.mark.parametrize("program", ["fastgen.cli", "fastgen.demo"])
def test_an_interrupt_while_importing_is_one_line(tmp_path, module, program):
    """The first is imported with fastgen itself, before its `main`."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(INTERRUPT)
    path = f"{tmp_path}{os.pathsep}{Path(fastgen.__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-m", program, *(["train", "vae"] if program == "fastgen.cli" else [])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130
    assert done.stderr.startswith("fastgen: error: interrupted") and done.stderr.count("\n") == 1


def test_an_interrupted_import_in_a_program_of_the_users_is_theirs(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    program = "try:\n    import fastgen\nexcept KeyboardInterrupt:\n    print('mine')"
    path = f"{tmp_path}{os.pathsep}{Path(fastgen.__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")


def test_missing_extras_are_named(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("accelerate", "yaml") else find(name, *rest),
    )
    for command in (["train", "vqvae"], ["sample", "x"], ["eval", "x"]):
        line = refused(*command)
        assert "accelerate, pyyaml not installed; run: pip install 'fastgen[train]'" in line


def test_a_nan_loss_is_one_line_and_status_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [*SHORT, "--autoencoder.optimizer.lr", "100", "--autoencoder.steps", "20"]
    assert main(["train", "vqvae", *arguments, "--autoencoder.optimizer.warmup_steps", "0"]) == 1
    assert "NaN or infinity at step" in capsys.readouterr().err


def test_sigterm_is_one_line_and_status_143(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = StageRun.step

    def terminated(run):
        step(run)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StageRun, "step", terminated)
    assert main(["train", "vqvae", *SHORT, "--run-dir", "run"]) == 143
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"go on with fastgen train --resume {tmp_path / 'run'}" in err
    monkeypatch.setattr(StageRun, "step", step)
    assert main(["train", "--resume", "run"]) == 0
    saved = ckpt.list_checkpoints(tmp_path / "run/checkpoints")
    assert ckpt.load_checkpoint(saved[-1])["progress"]["stage"] == "prior"


def test_info(capsys):
    main(["info"])
    assert "vq_quantize" in capsys.readouterr().out


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "train RECIPE" in capsys.readouterr().out
    assert main(["train", "vqvae", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--model.num_codes" in out and "codebook size" in out


@pytest.mark.parametrize("module", ["fastgen.cli", "fastgen.demo"])
def test_as_a_program(module, tmp_path):
    bad = ["train", "vqgan"] if module == "fastgen.cli" else ["--data", "cats"]
    done = subprocess.run(
        [sys.executable, "-m", module, *bad], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastgen: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_import_needs_no_extras():
    code = (
        "import sys, fastgen, fastgen.cli;"
        "extras = {'accelerate', 'jsonargparse', 'safetensors', 'tensorboard', 'PIL', 'sklearn'};"
        "sys.exit(', '.join(extras & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
