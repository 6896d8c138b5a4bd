"""The benchmark harness: what it times, compares, keeps and refuses. No test looks at a time."""

import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgen import backends, ops
from fastgen.ops import _library

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import clock, compare, memory, results, run  # noqa: E402
from benchmarks.case import (  # noqa: E402
    BACKWARD,
    BOTH,
    COPY,
    FORWARD,
    SECOND,
    Case,
    Provider,
    Timing,
)
from benchmarks.harness import check_same, make_step, providers, run_case  # noqa: E402
from benchmarks.roof import Roof, measure_roof  # noqa: E402

ROOF = Roof(bandwidth=1e9, flops=2e9)


def tiny(size="2x3x4", peers=None, **changes):
    shape = tuple(int(n) for n in size.split("x"))
    settings = dict(grad=(0,), bytes=1000, flops=100, compiled=False)
    return Case(
        op="instance_norm",
        size=size,
        make=lambda: (torch.randn(shape),),
        call=ops.instance_norm,
        peers=peers or {},
        **{**settings, **changes},
    )


def missing(x):
    raise ModuleNotFoundError("No module named 'nolib'", name="nolib")


def negated(x):
    return -ops.instance_norm(x)


@pytest.fixture
def setting_kept(threads, isa):
    """run.main sets threads and the instruction set of the process; both come back."""


# --- timing ------------------------------------------------------------------------------------


def test_every_provider_in_every_mode():
    timings = list(
        run_case(tiny(peers={"torch": torch.nn.functional.instance_norm}), ROOF, budget=0)
    )
    for mode in FORWARD, BOTH:
        found = [t.provider for t in timings if t.mode == mode]
        assert found == ["fastgen", "reference", "torch", COPY]
    for t in timings:
        assert 0 < t.low <= t.seconds <= t.high
        assert not t.note
    shares = [t.share for t in timings if t.mode == FORWARD and t.provider != COPY]
    assert all(share > 0 for share in shares)
    assert all(math.isnan(t.share) for t in timings if t.mode == BOTH), "nobody counted backward"


def test_a_missing_peer_is_named():
    timings = list(run_case(tiny(peers={"other": missing}), ROOF, budget=0))
    notes = {(t.mode, t.note) for t in timings if t.provider == "other"}
    assert notes == {(FORWARD, "not installed: nolib"), (BOTH, "not installed: nolib")}


def failing(x):
    raise RuntimeError("out of something\nand more")


def test_a_peer_that_fails_is_noted():
    timings = list(run_case(tiny(peers={"other": failing}), ROOF, budget=0))
    notes = {(t.mode, t.note) for t in timings if t.provider == "other"}
    assert {note for _, note in notes} == {"RuntimeError: out of something"}
    assert {t.mode for t in timings if t.provider == "fastgen"} == {FORWARD, BOTH}


def test_fastgen_may_not_fail():
    case = replace(tiny(), call=lambda x, backend=None: failing(x))
    with pytest.raises(RuntimeError, match="out of something"):
        list(run_case(case, ROOF, budget=0))


def test_what_takes_too_long_is_noted():
    def slow(x):
        time.sleep(30)

    timings = run_case(tiny(peers={"slow": slow}), ROOF, budget=0, limit=0.2)
    notes = {t.note for t in timings if t.provider == "slow"}
    assert notes == {"TimeoutError: not done after 0.2 s"}


def test_gradients_alone_and_of_second_order():
    """Of y = x^3: 3 x^2, and with a cotangent v the gradient of 3 x^2 v for x and v."""
    x = torch.randn(5)
    step = make_step(lambda t: t**3, (x,), (0,), BACKWARD)
    for _ in range(2):
        torch.testing.assert_close(step(), (3 * x**2,))
    step = make_step(lambda t: t**3, (x,), (0,), SECOND)
    for _ in range(2):
        torch.testing.assert_close(step(), (6 * x, 3 * x**2))
    case = tiny(more=(BACKWARD, SECOND), bytes_backward=10, bytes_second=20)
    assert case.modes == (FORWARD, BOTH, BACKWARD, SECOND)
    assert (case.work(BACKWARD), case.work(SECOND)) == ((10, 0), (20, 0))
    timed = {t.mode for t in run_case(case, ROOF, budget=0) if t.provider == "fastgen"}
    assert timed == {FORWARD, BOTH, BACKWARD, SECOND}


def test_providers_of_a_device():
    peers = {"cpu": Provider(negated, device="cpu"), "gpu": Provider(negated, device="cuda")}
    case = tiny(peers=peers)
    assert list(providers(case)) == ["fastgen", "reference", "cpu"]
    assert list(providers(case, None, torch.device("cuda"))) == ["fastgen", "reference", "gpu"]


def test_wanted_providers():
    timings = run_case(tiny(peers={"other": missing}), ROOF, budget=0, wanted=["reference"])
    assert {t.provider for t in timings} == {"fastgen", "reference", COPY}


def test_a_peer_that_computes_something_else_is_refused():
    case = tiny(
        peers={"negated": Provider(negated, tolerance=1e-3)}, small=lambda: (torch.randn(2, 3, 4),)
    )
    with pytest.raises(ValueError, match=r"negated computes something else \(result 0\)"):
        list(run_case(case, ROOF, budget=0))


def test_inputs_of_a_peer_can_be_converted():
    same = Provider(negated, prepare=lambda x: (-x,), tolerance=1e-6)
    case = tiny(peers={"same": same}, small=lambda: (torch.randn(2, 3, 4),))
    assert "same" in {t.provider for t in run_case(case, ROOF, budget=0)}


@pytest.mark.parametrize("op", sorted(backends.ops()))
@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.filterwarnings("ignore")
def test_cases_of_an_op(op, device):
    """Sizes are keys, every mode has its work counted, peers compute what they claim."""
    cases = run.all_cases(op, device)
    assert len({case.size for case in cases}) == len(cases)
    for case in cases:
        assert case.op == op
        assert all(case.work(mode)[0] > 0 for mode in case.modes), f"{case.size} counts no bytes"
        for name, peer in case.peers.items():
            if isinstance(peer, Provider):
                try:
                    check_same(case, name, peer)
                except ImportError:
                    continue


# --- a GPU that is not there -------------------------------------------------------------------

CUDA = torch.device("cuda")


class FakeGpu:
    """A device whose calls take 2 ms, after which its events find the clock moved."""

    def __init__(self, monkeypatch):
        self.now, self.waits, fake = 0.0, 0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                fake.waits += 1

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        properties = SimpleNamespace(L2_cache_size=60 * 2**20)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def call(self):
        self.now += 2e-3


def test_events_time_calls_without_waiting_between_them(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    assert clock.timed(gpu.call, CUDA, calls=10) == pytest.approx(2e-3)
    assert gpu.waits == 1
    assert clock.calls_of_batch(gpu.call, CUDA) == round(clock.BATCH / 2e-3)
    assert clock.calls_of_batch(gpu.call, torch.device("cpu")) == 1


def test_inputs_take_turns_where_they_would_stay_in_the_cache(monkeypatch):
    FakeGpu(monkeypatch)
    mib = 2**20
    sizes = (0, 1, 20 * mib, 100 * mib, 180 * mib, 1000 * mib)
    found = [clock.sets_of_inputs(size, CUDA) for size in sizes]
    assert found == [1, clock.MOST_SETS, 9, 2, 1, 1]
    assert clock.sets_of_inputs(20 * mib, torch.device("cpu")) == 1
    seen = []
    step = clock.in_turn([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        step()
    assert seen == [0, 1, 2, 0]


def test_a_limit_of_time_ends_with_its_block():
    with pytest.raises(TimeoutError, match="not done after 0.05 s"), clock.time_limit(0.05):
        time.sleep(30)
    with clock.time_limit(0.05), clock.time_limit(None):
        pass
    time.sleep(0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys):
    for arguments, message in (
        (["--device", "cuda"], "--device cuda: there is no NVIDIA GPU"),
        (["--device", "cuda", "--threads", "1"], "--threads is for --device cpu"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run.main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_which_of_the_providers_compile():
    case = tiny(peers={"torch": negated, "torch compiled": negated})
    assert run.wanted_of(case, None, "yes") is None
    assert run.wanted_of(case, None, "no") == ["reference", "torch"]
    assert run.wanted_of(case, None, "only") == ["torch.compile", "torch compiled"]
    assert run.wanted_of(case, ["torch", "torch compiled"], "no") == ["torch"]


def test_work_of_a_mode():
    case = tiny(bytes_backward=10, flops_backward=1)
    assert case.work(FORWARD) == (1000, 100)
    assert case.work(BOTH) == (1010, 101)
    assert tiny().work(BOTH) == (0, 0)


# --- limits of the machine ---------------------------------------------------------------------


def test_share_of_the_roof():
    assert ROOF.share(1000, 100, 2e-6, 1e9) == pytest.approx(0.5)
    assert ROOF.share(1000, 8000, 8e-6, 1e9) == pytest.approx(0.5)
    assert math.isnan(ROOF.share(0, 0, 1.0, 1e9))
    higher = ROOF.or_more(Roof(bandwidth=3e9, flops=1e9, bf16_flops=5e9))
    assert higher == Roof(bandwidth=3e9, flops=2e9, bf16_flops=5e9)


def test_probes_count_their_operations(isa):
    vectors = {"portable": 6 * 8, "avx2": 12 * 8, "avx512": 24 * 16, "avx512bf16": 24 * 16}
    for name in filter(isa, _library.CPU_ISAS):
        assert torch.ops.fastgen.fma_probe(3, 5) == 3 * 5 * 2 * vectors[name]
        dots = torch.ops.fastgen.bf16_dot_probe(2, 7)
        assert dots == (2 * 7 * 24 * 64 if name == "avx512bf16" else 0)


def test_measured_roof_is_positive():
    roof = measure_roof(torch.device("cpu"))
    assert roof.bandwidth > 0
    assert roof.flops > 0


def test_roof_prints_the_limits_in_a_process_of_its_own():
    command = [sys.executable, "-m", "benchmarks.roof"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.match(
        r"CPU, torch \S+: copy [\d.]+ GB/s, float32 multiply-add \d+ GFLOP/s", done.stdout
    )


def test_peak_of_memory():
    mib = 2**20
    cpu = torch.device("cpu")

    def kept():
        return torch.ones(16 * mib, dtype=torch.uint8)

    def freed():
        return (torch.ones(16 * mib, dtype=torch.uint8) + 1).max().item()

    if math.isnan(memory.peak_bytes(kept, cpu)):
        pytest.skip("this system does not reset the high-water mark")
    assert 15.5 * mib < memory.peak_bytes(kept, cpu) < 20 * mib
    assert 31.5 * mib < memory.peak_bytes(freed, cpu) < 38 * mib


# --- results -----------------------------------------------------------------------------------


def table_of(case, isa="avx2"):
    timings = [
        Timing("fastgen", FORWARD, 2e-3, 1e-3, 3e-3, peak=2**20, share=0.5),
        Timing("reference", FORWARD, 3e-3, 2e-3, 4e-3, peak=3 * 2**20, share=0.25),
        Timing("other", FORWARD, note="not installed: nolib"),
    ]
    return results.rows_of(case, timings, ROOF, isa, "abc")


def test_rows_have_every_column():
    ours, reference, absent = table_of(tiny())
    for row in ours, reference, absent:
        assert tuple(row) == results.COLUMNS
    assert (ours["median_ms"], ours["peak_mib"], ours["roof_share"]) == ("2.0000", "1.0", "0.500")
    assert (ours["ratio"], reference["ratio"]) == ("1.000", "1.500")
    assert (ours["op"], ours["size"], ours["isa"]) == ("instance_norm", "2x3x4", "avx2")
    assert (ours["bytes"], ours["flops"], ours["commit"]) == ("1000", "100", "abc")
    assert absent["note"] == "not installed: nolib"
    assert absent["median_ms"] == absent["ratio"] == absent["peak_mib"] == ""


def test_a_rerun_replaces_its_own_rows(tmp_path):
    path = tmp_path / "a" / "op.csv"
    sizes = ["2x3x4", "1x2x8"]

    def put(case, isa, date, provider=None):
        rows = [{**row, "date": date} for row in table_of(case, isa)]
        rows = [row for row in rows if provider in (None, row["provider"])]
        results.update(path, rows, sizes, keep_others=provider is not None)

    def dates(**where):
        rows = results.read(path)
        return {r["date"] for r in rows if all(r[k] == v for k, v in where.items())}

    put(tiny("1x2x8"), "avx2", "1")
    put(tiny(), "avx2", "1")
    put(tiny(), "portable", "1")
    put(tiny(), "avx2", "2")
    assert dates(size="2x3x4", isa="avx2") == {"2"}
    assert dates(size="2x3x4", isa="portable") == dates(size="1x2x8") == {"1"}
    assert [row["size"] for row in results.read(path)][0] == "2x3x4"
    put(tiny(), "avx2", "3", provider="fastgen")
    assert dates(size="2x3x4", isa="avx2", provider="fastgen") == {"3"}
    assert dates(size="2x3x4", isa="avx2", provider="reference") == {"2"}
    sizes = ["2x3x4"]
    put(tiny(), "avx2", "4")
    assert dates(size="1x2x8") == set()
    assert list(path.parent.iterdir()) == [path]


def test_a_file_with_other_columns_is_refused(tmp_path, capsys):
    path = tmp_path / "op.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns date, commit"):
        results.update(path, [], [])
    path.rename(tmp_path / "adain.csv")
    with pytest.raises(SystemExit):
        run.main(["adain", "--out", str(tmp_path)])
    assert "adain.csv: expected the columns" in capsys.readouterr().err


def test_machine_name_has_no_settings(threads):
    threads(1)
    name = results.machine_name()
    threads(2)
    assert results.machine_name() == name
    assert name == name.lower().strip("-")


def test_report(tmp_path, capsys):
    from benchmarks import report

    rows = table_of(tiny())
    rows[1]["ratio"] = "0.750"
    results.update(tmp_path / "instance_norm.csv", rows, ["2x3x4"])
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    line = "| instance_norm 2x3x4 | forward | 2 x avx2 | 2 ms | 50% | 1.0 | reference 0.75 |"
    assert line.replace("2 x", f"{torch.get_num_threads()} x") in printed
    assert "reference 0.75 of our time" in printed
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nothing")])


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown op 'nothing'; expected one of adain, "),
        (["adain", "--isa", "sse9"], "unknown --isa 'sse9'; expected portable, avx2, avx512"),
        (["adain", "--threads", "1,x"], "expected positive integers, got 'x'"),
        (["adain", "--threads", "0"], "expected positive integers, got '0'"),
        (["adain", "--filter", "no such size"], "--filter 'no such size': no case of adain has it"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def only_tiny(monkeypatch, *cases, green=True):
    monkeypatch.setattr(run, "all_cases", lambda op, device: list(cases))
    monkeypatch.setattr(run, "tests_pass", lambda op: green)
    monkeypatch.setattr(run, "measure_roof", lambda device: ROOF)


def test_a_run_keeps_results(monkeypatch, tmp_path, capsys, setting_kept):
    pytest.importorskip("matplotlib")
    more = {"more": (BACKWARD, SECOND), "bytes_second": 10}
    counted = tiny(peers={"other": missing}, bytes_backward=10, flops_backward=1, **more)
    only_tiny(monkeypatch, counted, tiny("1x2x8"))
    arguments = ["instance_norm", "--threads", "1,2", "--isa", "portable", "--budget", "0"]
    assert run.main([*arguments, "--providers", "reference,other", "--out", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "instance_norm.csv")
    keys = [tuple(row[c] for c in ("size", "threads", "mode", "provider")) for row in rows]
    names = {"2x3x4": ("fastgen", "reference", "other", COPY)}
    names["1x2x8"] = ("fastgen", "reference", COPY)
    modes = {"2x3x4": (FORWARD, BOTH, BACKWARD, SECOND), "1x2x8": (FORWARD, BOTH)}
    assert set(keys) == {
        (size, threads, mode, name)
        for size in names
        for threads in "12"
        for mode in modes[size]
        for name in names[size]
    }
    assert {row["note"] for row in rows if row["provider"] == "other"} == {"not installed: nolib"}
    assert len(set(keys)) == len(keys)
    assert {row["isa"] for row in rows} == {"portable"}
    for name in "speed.png", "roofline.png":
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "[1/4, 0:0" in printed
    assert "times as fast with 2 threads as with 1" in printed
    assert "other                    not installed: nolib" in printed


def test_no_figures_on_red(monkeypatch, tmp_path, capsys, setting_kept):
    only_tiny(monkeypatch, tiny(), green=False)
    assert run.main(["instance_norm", "--budget", "0", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "instance_norm: tests fail, no figures" in capsys.readouterr().out


@pytest.mark.parametrize("green", (True, False))
def test_the_tests_of_the_op_decide(monkeypatch, tmp_path, green):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (folder.parent / "test_ops.py").write_text(
        "import pytest\n@pytest.mark.parametrize('case', ['it-', 'other-'])\n"
        "def test(case): assert case == 'it-'\n"
    )
    (folder / "test_it.py").write_text(f"def test_it(): assert {green}\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.tests_pass("it") is green


def test_a_failing_case_does_not_stop_the_others(monkeypatch, tmp_path, capsys, setting_kept):
    bad = replace(tiny(), call=lambda x, backend=None: failing(x))
    only_tiny(monkeypatch, bad, tiny("1x2x8"))
    arguments = ["instance_norm", "--budget", "0", "--providers", "reference"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 1
    assert {row["size"] for row in results.read(tmp_path / "instance_norm.csv")} == {"1x2x8"}
    assert "RuntimeError: out of something" in capsys.readouterr().err


def test_quick_keeps_nothing(monkeypatch, setting_kept):
    only_tiny(monkeypatch, tiny(), green=False)
    monkeypatch.setattr(results, "update", None)
    monkeypatch.setattr(run, "QUICK_BUDGET", 0.0)
    assert run.main(["instance_norm", "--quick", "--providers", "reference"]) == 0


def test_an_interrupted_run_keeps_what_is_done(monkeypatch, tmp_path, setting_kept):
    only_tiny(monkeypatch, tiny(), tiny("1x2x8"))
    time_case = run.time_case

    def once(case, *rest):
        if case.size == "1x2x8":
            raise KeyboardInterrupt
        return time_case(case, *rest)

    monkeypatch.setattr(run, "time_case", once)
    assert run.main(["instance_norm", "--budget", "0", "--out", str(tmp_path)]) == 130
    assert {row["size"] for row in results.read(tmp_path / "instance_norm.csv")} == {"2x3x4"}


# --- another revision --------------------------------------------------------------------------


def test_what_base_needs(monkeypatch, tmp_path, capsys):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert len(compare.resolve("HEAD")) == 40
    assert run.main(["adain", "--base", "no-such-revision", "--out", str(tmp_path)]) == 2
    assert "--base 'no-such-revision': there is no such revision" in capsys.readouterr().err
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with pytest.raises(compare.CompareError, match="--base needs a git checkout"):
        compare.resolve("HEAD")


def test_build_of_a_revision(monkeypatch, tmp_path):
    """Pure Python, which takes seconds; nothing but the package is left behind."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.setenv("FASTGEN_CPU", "0")
    monkeypatch.setattr(compare, "BUILDS", tmp_path)
    commit = compare.resolve("HEAD")
    tree = compare.build(commit)
    assert list(tmp_path.iterdir()) == [tree]
    assert [p.name for p in tree.iterdir()] == ["fastgen"]
    assert (tree / "fastgen" / "kernels" / "__init__.py").exists()
    monkeypatch.setattr(compare.subprocess, "run", None)
    assert compare.build(commit) == tree


def test_two_processes_take_turns():
    case = next(case for case in run.all_cases("adain") if case.size == "8x512x4x4")
    base, now = (compare.Side(name, ROOT, {}) for name in ("base", "now"))
    try:
        where = {"op": "adain", "size": case.size, "mode": BOTH, "threads": 1, "isa": "portable"}
        result = compare.alternate(base, now, 0.0, **where)
        assert len(result.ratios) == compare.LEAST_ROUNDS
        low, middle, high = result.spread
        assert 0 < low <= middle <= high
        absent = compare.alternate(base, now, 0.0, **{**where, "op": "nothing"})
        assert absent.note.startswith("not in base: No module named")
    finally:
        base.close()
        now.close()


def test_the_wrong_package_is_noticed(tmp_path):
    with pytest.raises(compare.CompareError, match="the process of base ended"):
        compare.Side("base", tmp_path, {})


def test_charts_label_without_overlap():
    roofline = pytest.importorskip("benchmarks.roofline")
    heights = [0.1, 0.1, 0.1, 0.5, 0.99, 1.0, 1.0]
    spread = roofline._spread(heights)
    gaps = [b - a for a, b in zip(spread, spread[1:], strict=False)]
    assert min(gaps) >= 0.027 - 1e-9
    assert spread[0] >= 0 and spread[-1] <= 1
    assert spread[3] == pytest.approx(0.5)
