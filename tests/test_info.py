"""python -m fastgen.info: it names every op and backend, and says why where one cannot run."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fastgen
from fastgen import backends, info
from fastgen.ops import _library


def test_json_is_the_collected_report(capsys):
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_versions():
    versions = info.collect()["versions"]
    assert versions["fastgen"] == fastgen.__version__
    assert versions["torch"] == torch.__version__


def test_every_op_and_backend_is_listed():
    table = info.collect()["ops"]
    assert set(table) == set(backends.ops())
    for name, op in backends.ops().items():
        assert set(table[name]) == set(op.implementations)
        assert table[name]["reference"] is None


def test_text_fits_the_terminal_and_names_every_op():
    report = info.collect()
    text = info.render(report)
    location = report["versions"]["location"]
    assert max(len(line) for line in text.splitlines() if location not in line) <= 100
    for op in backends.ops():
        assert f"\n  {op} " in text


def test_reasons_are_footnotes():
    report = info.collect()
    reason = "left out by FASTGEN_CUDA=0, " + "for a reason that takes more than one line " * 3
    report["ops"] = {
        "adain": {"cuda": reason, "triton": "no triton", "cpu": None, "reference": None},
        "vq_nearest": {"cuda": reason, "cpu": None, "reference": None},
    }
    lines = info.render(report).splitlines()
    rows = {
        line.split()[0]: line.split()[1:] for line in lines if line.startswith(("  adain", "  vq_"))
    }
    assert rows["adain"] == ["no", "[1]", "no", "[2]", "yes", "yes"]
    assert rows["vq_nearest"] == ["no", "[1]", "-", "yes", "yes"]
    assert any(line.startswith("  [1] left out by FASTGEN_CUDA=0") for line in lines)
    assert max(map(len, lines)) <= 100


def test_a_kernel_for_a_missing_device_names_the_device():
    def function():
        raise AssertionError("never run")

    on_cuda = backends.Implementation(function, "cuda", None, None)
    reason = info._reason_against(on_cuda)
    if torch.cuda.is_available():
        assert reason is None
    else:
        assert reason.startswith("needs a CUDA device: ")
    left_out = backends.Implementation(function, "cuda", "left out by FASTGEN_CUDA=0", None)
    assert info._reason_against(left_out) == "left out by FASTGEN_CUDA=0"


def test_instruction_sets(isa):
    best = info.collect()["cpu"]["best here"]
    assert best in _library.CPU_ISAS
    assert isa("portable")
    assert info.collect()["cpu"] == {
        "instruction set": "portable",
        "best here": best,
        "threads": torch.get_num_threads(),
    }


def test_one_thread_is_printed_as_a_number(threads):
    threads(1)
    assert "  threads                 1\n" in info.render(info.collect())


def test_environment_is_shown_and_typing_errors_are_pointed_out(monkeypatch):
    monkeypatch.setenv("FASTGEN_DATA", "/somewhere")
    monkeypatch.setenv("FASTGEN_BACKENDS", "reference")
    text = info.render(info.collect())
    assert "FASTGEN_DATA=/somewhere" in text
    assert "! FASTGEN_BACKENDS: not a variable that fastgen knows" in text


def test_something_broken_is_shown_and_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(_library, "broken", ["fastgen._C does not load: file too short"])
    assert info.main([]) == 1
    assert "! BROKEN: fastgen._C does not load: file too short" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_runs_as_a_module(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastgen.info", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "FASTGEN_STRICT": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "reference" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes that break as on POSIX")
@pytest.mark.parametrize("options", ([], ["--json"]))
def test_a_reader_that_closes_early(options):
    command = [sys.executable, "-m", "fastgen.info", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
