"""Runs benchmarks: `python -m benchmarks.run [OP ...]`.

For each op: its tests first (no figures on red), then every case of `benchmarks/ops/bench_<op>.py`.
Prints ratios to fastgen, the share of the measured roof and the peak of memory, and keeps a CSV an
op and two charts in benchmarks/results/<machine>/. With `--base REV` compares the working tree with
another revision instead. With `--device cuda` it times the GPU, at sizes of its own.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import compare, results
from benchmarks.case import Case, Setting, Timing
from benchmarks.harness import run_case
from benchmarks.roof import Roof, measure_roof
from fastgen import backends, memory
from fastgen.ops import _library

ROOT = results.ROOT
CPU = torch.device("cpu")
QUICK_BUDGET = 0.3
#: What a mode of a case may take to compile on a GPU, where many cases must fit into minutes.
COMPILE_LIMIT = 60.0


def tests_pass(op: str) -> bool:
    """Runs the op's tests; a benchmark of a wrong kernel says nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", "not slow"]
    files = [str(ROOT / "tests" / "test_ops.py"), "-k", f"{op}-"]
    special = ROOT / "tests" / "ops" / f"test_{op}.py"
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and special.exists():
        done = subprocess.run([*command, str(special)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-3000:], done.stderr[-1000:], sep="\n")
    return done.returncode == 0


class Progress:
    """Says which case is next, how many there are and how long it has taken."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()

    def next(self, text: str) -> None:
        self.done += 1
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        print(f"\n[{self.done}/{self.total}, {minutes}:{seconds:02}] {text}", flush=True)


def print_timing(t: Timing, ours: float) -> None:
    """One line: time, spread, ratio to fastgen, share of the roof, peak of memory."""
    if t.note:
        print(f"  {t.mode:17} {t.provider:24} {t.note}", flush=True)
        return
    share = "" if t.share != t.share else f"  {t.share:5.0%} of the roof"
    print(
        f"  {t.mode:17} {t.provider:24} {t.seconds * 1e3:9.3f} ms"
        f"  [{t.low * 1e3:.3f} .. {t.high * 1e3:.3f}]"
        f"  {t.seconds / ours:7.2f} x fastgen  {t.peak / 2**20:8.1f} MiB{share}",
        flush=True,
    )


def wanted_of(case: Case, named: list[str] | None, compiled: str) -> list[str] | None:
    """Names of the providers to time beside fastgen, None for all.

    `compiled` is "yes", "no" or "only": whether those that torch.compile makes are among them.
    """
    if compiled == "yes":
        return named
    names = ["reference", "torch.compile", *case.peers]
    return [
        name
        for name in names
        if (named is None or name in named) and ("compile" in name) == (compiled == "only")
    ]


def time_case(case: Case, roof: Roof, options: argparse.Namespace) -> list[Timing]:
    """Times and prints one case under the setting in force."""
    timings: list[Timing] = []
    ours = float("nan")
    wanted = wanted_of(case, options.providers, options.compiled)
    device = torch.device(options.device)
    for t in run_case(
        case, roof, budget=options.budget, wanted=wanted, device=device, limit=options.limit
    ):
        timings.append(t)
        if t.provider == "fastgen":
            ours = t.seconds
        print_timing(t, ours)
    return timings


def print_scaling(case: Case, times: dict[Setting, dict[str, float]]) -> None:
    """How much faster fastgen is with the most threads than with the fewest, a line a mode."""
    for isa in dict.fromkeys(setting.isa for setting in times):
        fewest, *_, most = sorted((s for s in times if s.isa == isa), key=lambda s: s.threads)
        for mode, seconds in times[fewest].items():
            factor = seconds / times[most][mode]
            print(
                f"  {mode:17} fastgen, {isa}: {factor:.2f} times as fast with {most.threads} "
                f"threads as with {fewest.threads}"
            )


def bench_op(
    op: str,
    cases: Sequence[Case],
    roofs: dict[Setting, Roof],
    progress: Progress,
    options: argparse.Namespace,
) -> bool:
    """Times the chosen cases of one op under every setting; results are kept case by case.

    Returns:
        Whether all went well; what goes wrong is printed, and the other cases follow.
    """
    fine = True
    sizes = [case.size for case in all_cases(op, options.device)]
    commit = results.revision()
    for case in cases:
        times: dict[Setting, dict[str, float]] = {}
        for setting, roof in list(roofs.items()):
            progress.next(f"{op} {case.size}, {setting}")
            setting.apply()
            if options.device == "cpu":
                # What shares the machine comes and goes.
                roofs[setting] = roof = roof.or_more(measure_roof(CPU))
            try:
                timings = time_case(case, roof, options)
            except Exception:
                traceback.print_exc()
                fine = False
                continue
            times[setting] = {t.mode: t.seconds for t in timings if t.provider == "fastgen"}
            if options.out is not None:
                table = results.rows_of(case, timings, roof, setting.isa, commit, options.device)
                keep_others = options.providers is not None or options.compiled != "yes"
                results.update(options.out / f"{op}.csv", table, sizes, keep_others=keep_others)
        if len({setting.threads for setting in times}) > 1:
            print_scaling(case, times)
    return fine


def all_cases(op: str, device: str = "cpu") -> list[Case]:
    """The cases of an op for a CPU or a GPU ("cuda")."""
    module = importlib.import_module(f"benchmarks.ops.bench_{op}")
    return module.GPU_CASES if device == "cuda" else module.CASES


def chosen_cases(ops: Sequence[str], wanted: str, device: str = "cpu") -> dict[str, list[Case]]:
    """The cases of each op whose size contains `wanted`; ops with none are left out."""
    chosen = {op: [case for case in all_cases(op, device) if wanted in case.size] for op in ops}
    return {op: cases for op, cases in chosen.items() if cases}


def check_kept(folder: Path | None, ops: Iterable[str]) -> None:
    """Raises ValueError where `folder` has a CSV of one of the ops that cannot be added to."""
    for op in ops:
        if folder is not None and (folder / f"{op}.csv").exists():
            results.read(folder / f"{op}.csv")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers, got {text!r}")
    return int(text)


def _thread_counts(text: str) -> list[int]:
    return [_positive_int(part) for part in _list(text)]


def parser(
    known: Sequence[str], p: argparse.ArgumentParser | None = None
) -> argparse.ArgumentParser:
    if p is None:
        p = argparse.ArgumentParser(prog="python -m benchmarks.run", allow_abbrev=False)
    p.description = __doc__.split("\n")[0]
    p.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(known)}; default all")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    p.add_argument("--filter", default="", metavar="SIZE", help="only cases whose size contains it")
    p.add_argument(
        "--providers", type=_list, metavar="A,B", help="only these beside fastgen, e.g. faiss"
    )
    p.add_argument(
        "--compiled",
        choices=("yes", "no", "only"),
        default="yes",
        help="whether to time what torch.compile makes, which takes most of the time of a run",
    )
    p.add_argument("--budget", type=float, default=4.0, help="seconds a case and mode (default 4)")
    p.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="what the first call of anything but fastgen may take, compilation included "
        f"(default: none on a CPU, {COMPILE_LIMIT:g} on a GPU)",
    )
    p.add_argument(
        "--skip-tests", action="store_true", help="the op's tests have been run just before"
    )
    p.add_argument(
        "--threads", type=_thread_counts, metavar="1,2", help="thread counts (default: all cores)"
    )
    p.add_argument(
        "--isa",
        type=_list,
        metavar="avx2,portable",
        help="instruction sets of fastgen's kernels, the others choose theirs (default: the best)",
    )
    results.add_heap_option(p)
    p.add_argument("--out", type=Path, help="folder for CSV and PNG; default results/<machine>")
    p.add_argument(
        "--quick",
        action="store_true",
        help=f"a look: {QUICK_BUDGET} s a case; no tests and nothing kept, unless --out is given",
    )
    p.add_argument("--base", metavar="REV", help="compare with this git revision of fastgen")
    return p


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every combination of thread count and instruction set.

    Raises:
        ValueError: an instruction set that is unknown or that the machine lacks; a GPU that is not
            there, or an argument that means nothing on it.
    """
    if options.device == "cuda":
        refused = {"--threads": options.threads, "--isa": options.isa, "--base": options.base}
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"{name} is for --device cpu")
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no NVIDIA GPU that PyTorch can use here")
        major, minor = torch.cuda.get_device_capability()
        return [Setting(torch.get_num_threads(), f"sm_{major}{minor}")]
    if _library.cpu_unavailable is not None:
        raise ValueError(f"no CPU kernels to time: {_library.cpu_unavailable}")
    best = torch.ops.fastgen.best_cpu_isa()
    found = []
    for isa in options.isa or [_library.CPU_ISAS[torch.ops.fastgen.cpu_isa()]]:
        if isa not in _library.CPU_ISAS:
            raise ValueError(f"unknown --isa {isa!r}; expected {', '.join(_library.CPU_ISAS)}")
        if _library.CPU_ISAS.index(isa) > best:
            raise ValueError(f"--isa {isa}: this machine's best is {_library.CPU_ISAS[best]}")
        found += [Setting(n, isa) for n in options.threads or [torch.get_num_threads()]]
    return found


def main(arguments: Sequence[str] | None = None, own: argparse.ArgumentParser | None = None) -> int:
    """Entry point; `fastgen bench` has a parser of its own.

    Returns:
        0; 1 where an op's tests or a case fail; 2 for a bad argument; 130 where it was interrupted.
    """
    known = sorted(backends.ops())
    p = parser(known, own)
    options = p.parse_args(arguments)
    refuse = partial(p.exit, 2)
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        refuse(f"unknown op {unknown[0]!r}; expected one of {', '.join(known)}\n")
    try:
        chosen = settings(options)
    except ValueError as error:
        refuse(f"{error}\n")
    cases = chosen_cases(options.ops or known, options.filter, options.device)
    if not cases:
        refuse(
            f"--filter {options.filter!r}: no case of {', '.join(options.ops or known)} has it\n"
        )
    if options.quick:
        options.budget = QUICK_BUDGET
    kept_heap = options.heap == "kept"
    if options.base is not None:
        environment = memory.ENVIRONMENT if kept_heap else {}
        return compare.main(options.base, cases, chosen, options.budget, options.out, environment)
    if kept_heap:
        memory.keep_freed_memory()
    keep = not options.quick or options.out is not None
    if keep and options.out is None:
        options.out = results.default_folder(options.heap, options.device)
    if options.limit is None and options.device == "cuda":
        options.limit = COMPILE_LIMIT
    try:
        check_kept(options.out, cases)
    except ValueError as error:
        refuse(f"{error}\n")
    try:
        return run(cases, chosen, options)
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished cases are in {options.out}" if keep else "\ninterrupted")
        return 130


def run(
    cases: dict[str, list[Case]], chosen: Sequence[Setting], options: argparse.Namespace
) -> int:
    """Tests and times every op; returns 1 where tests or cases failed, else 0."""
    print(f"machine: {results.machine_name(options.device)}, torch {torch.__version__}")
    roofs = {}
    for setting in chosen:
        setting.apply()
        roofs[setting] = measure_roof(torch.device(options.device))
        print(f"roof, {setting}: {roofs[setting]}")
    progress = Progress(len(chosen) * sum(len(of_op) for of_op in cases.values()))
    red, fine = [], True
    for op, of_op in cases.items():
        if options.out is not None and not options.skip_tests and not tests_pass(op):
            red.append(op)
            progress.done += len(chosen) * len(of_op)
            print(f"\n{op}: tests fail, no figures")
            continue
        fine &= bench_op(op, of_op, roofs, progress, options)
    if options.out is not None and any(options.out.glob("*.csv")):
        draw(options.out)
    return 1 if red or not fine else 0


def draw(folder: Path) -> None:
    """Draws the charts of everything in the folder, where matplotlib is there."""
    try:
        from benchmarks.plot import plot_results
    except ImportError as error:
        print(f"no charts: {error.name} is not installed")
        return
    for path in plot_results(folder):
        print(f"\nchart: {path}")


if __name__ == "__main__":
    sys.exit(main())
