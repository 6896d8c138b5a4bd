"""What `make gpu-check` does around its stages, with stages that need no GPU."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import gpu_check, profiling, results, small_cases  # noqa: E402
from benchmarks.stages import FAILED, OK, SKIPPED, STOPPED, Runner, Stage  # noqa: E402

MACHINE = gpu_check.Machine("NVIDIA H200", "9.0", "2.11.0+cu130", {}, has_xdist=False)


def python(code):
    return {"": [sys.executable, "-c", code]}


def states(runner):
    return {outcome.name: outcome.state for outcome in runner.outcomes}


def summary(folder):
    return {o["name"]: o for o in json.loads((folder / "summary.json").read_text())["stages"]}


# --- the runner --------------------------------------------------------------------------------


def test_a_failing_stage_does_not_stop_the_others(tmp_path):
    runner = Runner(tmp_path, 60, "title")
    status = runner.run(
        [
            Stage("first", python("print('hello')"), 30),
            Stage("second", python("print('the reason'); raise SystemExit(3)"), 30),
            Stage("third", python("import os; print(os.environ['A'])"), 30, environment={"A": "b"}),
        ]
    )
    assert status == 1
    assert states(runner) == {"first": OK, "second": FAILED, "third": OK}
    assert summary(tmp_path)["second"]["note"] == "exit status 3"
    assert (tmp_path / "first.log").read_text().endswith("hello\n")
    assert (tmp_path / "third.log").read_text().endswith("b\n")
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# title") and "| second | failed |" in text
    assert "the reason" in text and "hello" not in text


def test_green_is_zero(tmp_path):
    assert Runner(tmp_path, 60).run([Stage("first", python(""), 30)]) == 0


def test_a_stage_is_stopped_at_its_limit_with_what_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pids)!r}, 'w').write(str(child.pid)); print('so far'); time.sleep(60)"
    )
    runner = Runner(tmp_path, 60)
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.stages.GRACE", 0.3)
        assert runner.run([Stage("long", python(code), 2), Stage("later", python(""), 30)]) == 1
    assert time.monotonic() - begin < 15
    assert states(runner) == {"long": STOPPED, "later": OK}
    assert summary(tmp_path)["long"]["note"] == "stopped after 2 s"
    assert "so far" in (tmp_path / "long.log").read_text()
    child = Path("/proc") / pids.read_text()
    gone = time.monotonic() + 5
    while child.exists() and "Z" not in child.joinpath("stat").read_text().split()[2]:
        assert time.monotonic() < gone, "what the stage started still runs"
        time.sleep(0.05)


def test_a_stage_that_is_stopped_may_say_what_it_has(tmp_path):
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('2 failed so far')"
    )
    runner = Runner(tmp_path, 60)
    assert runner.run([Stage("tests", python(code), 2)]) == 1
    assert states(runner) == {"tests": STOPPED}
    assert "2 failed so far" in (tmp_path / "summary.md").read_text()


def test_processes_of_a_stage_run_at_once(tmp_path):
    meet = (
        "import pathlib, sys, time; me, other = (pathlib.Path(p) for p in {!r}); me.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = {
        n: [sys.executable, "-c", meet.format(p)] for n, p in {"a": (a, b), "b": (b, a)}.items()
    }
    runner = Runner(tmp_path, 60)
    assert runner.run([Stage("both", commands, 30)]) == 0
    assert {path.name for path in tmp_path.glob("*.log")} == {"both-a.log", "both-b.log"}


def test_later_stages_keep_their_share_of_the_time(tmp_path):
    runner = Runner(tmp_path, 25)
    stages = [
        Stage("greedy", python("import time; time.sleep(60)"), limit=60, reserve=1),
        Stage("modest", python(""), limit=60, reserve=21),
        Stage("not here", python(""), limit=60, reserve=60, missing="there is no tool"),
    ]
    assert runner.run(stages) == 1
    assert states(runner) == {"greedy": STOPPED, "modest": OK, "not here": SKIPPED}
    assert summary(tmp_path)["greedy"]["seconds"] < 20
    assert summary(tmp_path)["not here"]["note"] == "there is no tool"


def test_a_stage_without_time_is_a_failure(tmp_path):
    runner = Runner(tmp_path, 0)
    assert runner.run([Stage("late", python(""), 30)]) == 1
    assert summary(tmp_path)["late"]["note"] == "no time was left"


def test_what_needs_a_failed_stage_is_not_run(tmp_path):
    runner = Runner(tmp_path, 60)
    stages = [
        Stage("build", python("raise SystemExit(1)"), 30),
        Stage("tests", python(""), 30, needs=["build"]),
        Stage("roofs", python(""), 30),
    ]
    assert runner.run(stages) == 1
    assert states(runner) == {"build": FAILED, "tests": SKIPPED, "roofs": OK}
    assert summary(tmp_path)["tests"]["note"] == "build is needed: failed"


def test_a_tool_that_does_not_start_is_a_failure(tmp_path):
    runner = Runner(tmp_path, 60)
    assert runner.run([Stage("tool", {"": ["/no/such/tool"]}, 30)]) == 1
    assert "No such file" in summary(tmp_path)["tool"]["note"]


def test_an_interrupted_run_ends_its_processes_and_leaves_a_summary(tmp_path):
    code = (
        # A shell may have started the tests with interrupts ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from benchmarks.stages import Runner, Stage\n"
        f"folder = Path({str(tmp_path)!r})\n"
        'sleep = [sys.executable, \'-c\', f\'import os, time; open({str(folder / "pid")!r}, "w")'
        ".write(str(os.getpid())); time.sleep(60)']\n"
        "Runner(folder, 60).run([Stage('quick', {'': [sys.executable, '-c', '']}, 30),"
        " Stage('long', {'': sleep}, 60)])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pid, begin = tmp_path / "pid", time.monotonic()
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() - begin < 30 and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert list(summary(tmp_path)) == ["quick"]


def test_results_are_published_while_a_stage_runs(tmp_path):
    seen = []
    runner = Runner(tmp_path, 60, publish=lambda folder: seen.append(folder), every=0.1)
    assert runner.run([Stage("long", python("import time; time.sleep(1.5)"), 30)]) == 0
    assert len(seen) > 2 and set(seen) == {tmp_path}


def test_out_gets_few_files(tmp_path):
    """No more than a lent machine hands back."""
    out, kept, logs = tmp_path / "out", tmp_path / "h200", tmp_path / "logs"
    kept.mkdir()
    (kept / "adain.csv").write_text("a,b\n")
    runner = Runner(logs, 60, publish=gpu_check.publisher(out, kept))
    runner.run([Stage("first", python("print(1)"), 30)])
    names = {path.name for path in out.iterdir()}
    assert names == {"summary.json", "summary.md", "logs.tar.gz", "results.tar.gz"}
    with tarfile.open(out / "results.tar.gz") as archive:
        assert "h200/adain.csv" in archive.getnames()
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert "logs/first.log" in archive.getnames()


# --- the stages --------------------------------------------------------------------------------


def test_stages_fit_the_time():
    found = gpu_check.stages(MACHINE)
    assert len({stage.name for stage in found}) == len(found)
    assert sum(stage.reserve for stage in found) < gpu_check.DEADLINE
    # A build that takes all it may leaves the others what they cannot do without.
    assert found[0].limit + sum(stage.reserve for stage in found[1:]) > gpu_check.DEADLINE
    for i, stage in enumerate(found):
        assert set(stage.needs) <= {earlier.name for earlier in found[:i]}


def test_missing_tools_are_named():
    missing = {s.name: s.missing for s in gpu_check.stages(MACHINE) if s.missing}
    assert missing == {
        "sanitizers": "there is no compute-sanitizer",
        "profile": "there is no ncu",
    }


def test_the_build_is_for_the_gpu_that_is_there(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def target(arch):
        machine = gpu_check.Machine("x", arch, "2.11", {}, has_xdist=True)
        return gpu_check.stages(machine)[0].environment["TORCH_CUDA_ARCH_LIST"]

    assert [target(arch) for arch in ("8.0", "8.9", "9.0", "10.0")] == [
        "8.0",
        "8.9",
        "9.0a",
        "10.0",
    ]


def test_the_tests_exist():
    for name in gpu_check.TESTS:
        assert (ROOT / name).exists()


def test_results_lie_where_the_benchmarks_put_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: MACHINE.name)
    assert MACHINE.results == ROOT / "benchmarks" / "results" / results.machine_name("cuda")
    assert MACHINE.results.name == "h200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gpu-check: PyTorch {torch.__version__} sees no NVIDIA GPU: ")
    assert "Nothing was checked." in said
    with pytest.raises(SystemExit) as exit_:
        small_cases.main([])
    assert exit_.value.code == 2


def test_unknown_stages_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_machine", lambda: MACHINE)
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "tests,nothing"])
    assert "unknown stage nothing" in capsys.readouterr().err


def test_only_some_stages(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "find_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    ran = [Stage("a", python("raise SystemExit(1)"), 30), Stage("b", python(""), 30, needs=["a"])]
    monkeypatch.setattr(gpu_check, "stages", lambda machine: ran)
    assert gpu_check.main([]) == 1
    assert list(summary(tmp_path)) == ["a", "b"]
    assert gpu_check.main(["--only", "b"]) == 0
    assert list(summary(tmp_path)) == ["b"]
    assert "| b | ok |" in capsys.readouterr().out


def test_small_cases_run_every_op(capsys):
    assert small_cases.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for op in gpu_check.OPS:
        assert op in said


# --- profiles ----------------------------------------------------------------------------------


def row(op, share, ms="1.0", **changes):
    values = dict.fromkeys(results.COLUMNS, "") | {"op": op, "roof_share": share, "median_ms": ms}
    return (
        values | {"provider": "fastgen", "size": "1", "mode": "forward", "threads": "1"} | changes
    )


def test_the_worst_rows_are_profiled(tmp_path):
    kept = {
        "adain": [row("adain", "0.900", isa="1"), row("adain", "0.300", isa="2")],
        "normal": [row("normal", "0.100", ms="0.001"), row("normal", "0.200", provider="torch")],
        "rq_spline": [row("rq_spline", "0.400"), row("rq_spline", "")],
    }
    for op, rows in kept.items():
        results.update(tmp_path / f"{op}.csv", rows, ["1"])
    found = [(r["op"], r["roof_share"]) for r in profiling.worst(tmp_path, 2)]
    assert found == [("adain", "0.300"), ("rq_spline", "0.400")]
    assert [r["roof_share"] for r in profiling.worst(tmp_path, 9)] == ["0.300", "0.400", "0.900"]
    command = profiling.ncu_command(kept["adain"][0], "ncu")
    assert command[:3] == ["ncu", "--clock-control", "none"]
    assert command[-4:] == ["--one", "adain", "1", "forward"]
