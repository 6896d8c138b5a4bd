"""The benchmark harness: what it times, compares, keeps and refuses. No test looks at a time."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastgen import backends, ops
from fastgen.ops import _library

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import compare, memory, results, run  # noqa: E402
from benchmarks.case import BOTH, COPY, FORWARD, Case, Provider, Timing  # noqa: E402
from benchmarks.harness import check_same, run_case  # noqa: E402
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
@pytest.mark.filterwarnings("ignore")
def test_cases_of_an_op(op):
    """Sizes are keys, every mode has its work counted, peers compute what they claim."""
    cases = run.all_cases(op)
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
    monkeypatch.setattr(run, "all_cases", lambda op: list(cases))
    monkeypatch.setattr(run, "tests_pass", lambda op: green)
    monkeypatch.setattr(run, "measure_roof", lambda device: ROOF)


def test_a_run_keeps_results(monkeypatch, tmp_path, capsys, setting_kept):
    pytest.importorskip("matplotlib")
    counted = tiny(peers={"other": missing}, bytes_backward=10, flops_backward=1)
    only_tiny(monkeypatch, counted, tiny("1x2x8"))
    arguments = ["instance_norm", "--threads", "1,2", "--isa", "portable", "--budget", "0"]
    assert run.main([*arguments, "--providers", "reference,other", "--out", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "instance_norm.csv")
    keys = [tuple(row[c] for c in ("size", "threads", "mode", "provider")) for row in rows]
    names = {"2x3x4": ("fastgen", "reference", "other", COPY)}
    names["1x2x8"] = ("fastgen", "reference", COPY)
    assert set(keys) == {
        (size, threads, mode, name)
        for size in names
        for threads in "12"
        for mode in (FORWARD, BOTH)
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
