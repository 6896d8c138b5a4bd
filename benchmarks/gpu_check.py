"""Everything that needs an NVIDIA GPU, in one call: `make gpu-check`.

Builds for the GPU that is there, runs the GPU tests, measures the roofs and the benchmarks, runs
compute-sanitizer and the profiler, the most valuable first, within a total time. Logs and a summary
are in `build/gpu-check`; with the variable OUT set, that folder gets the summary and two archives,
of the logs and of the results, after every stage. Exit status: 0; 1 where something failed or ran
out of time; 2 where there is no GPU.

This file runs before anything is built: it imports neither torch nor fastgen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stages import Runner, Stage

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu-check"
#: Seconds of a whole run; a machine may be lent for ten minutes a command.
DEADLINE = 570.0
#: The most valuable first.
OPS = ("vq_nearest", "vq_quantize", "reparam_kl", "adain", "rq_spline", "affine_coupling")
OPS += ("instance_norm", "normal", "vq_codebook_stats")
TESTS = ("tests/test_cuda_build.py", "tests/test_ops.py", "tests/test_ops_gpu.py")
TESTS += ("tests/cuda", "tests/ops")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Processes that share the GPU in the tests.
WORKERS = 8

PROBE = """
import json, sys, torch
if not torch.cuda.is_available():
    why = "a CPU build" if torch.version.cuda is None else "no device"
    sys.exit(f"PyTorch {torch.__version__} sees no NVIDIA GPU: {why}")
p = torch.cuda.get_device_properties(0)
print(json.dumps({"name": p.name, "arch": f"{p.major}.{p.minor}", "torch": torch.__version__}))
"""


@dataclass(frozen=True)
class Machine:
    """The GPU that is there, and what of Python and tools is.

    Attributes:
        name, arch: of the GPU, "9.0".
        torch: its version.
        tools: where ncu and compute-sanitizer are.
        has_xdist: whether tests can run side by side.
    """

    name: str
    arch: str
    torch: str
    tools: dict[str, str]
    has_xdist: bool

    @property
    def target(self) -> str:
        """What to compile for: that of Hopper has instructions of its own."""
        return "9.0a" if self.arch == "9.0" else self.arch

    @property
    def results(self) -> Path:
        # As benchmarks.results.machine_name() has it, which needs fastgen.
        name = re.sub(r"[^a-z0-9]+", "-", self.name.removeprefix("NVIDIA ").lower()).strip("-")
        return ROOT / "benchmarks" / "results" / name


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def find_machine(python: str = sys.executable) -> Machine | str:
    """The machine, or why nothing can be checked on it."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["PyTorch does not start"])[-1]
    names = ("ncu", "compute-sanitizer")
    tools = {name: path for name in names if (path := find_tool(name)) is not None}
    has_xdist = importlib.util.find_spec("xdist") is not None
    return Machine(**json.loads(done.stdout.splitlines()[-1]), tools=tools, has_xdist=has_xdist)


def stages(machine: Machine, python: str = sys.executable) -> list[Stage]:
    """What to do on a machine, the most valuable first."""
    module = [python, "-m"]
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", machine.target)
    build = [*module, "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    build += ["-v", "-e", str(ROOT)]
    pytest = [*module, "pytest", "-v", "-m", "gpu", "--durations=15"]
    pytest += [f"-n{WORKERS}"] * machine.has_xdist
    bench = [*module, "benchmarks.run", *OPS, "--device", "cuda", "--skip-tests"]
    bench += ["--out", str(machine.results), "--budget"]
    strict = {"FASTGEN_STRICT": "1"}
    return [
        Stage(
            "build",
            {"": build},
            limit=280,
            environment={"TORCH_CUDA_ARCH_LIST": arch, "FASTGEN_CUDA": "1"},
        ),
        Stage(
            "info",
            {"fastgen": [*module, "fastgen.info"], "nvidia": ["nvidia-smi"]},
            limit=40,
            reserve=15,
            needs=["build"],
        ),
        Stage(
            "tests",
            {"": [*pytest, *(t for t in TESTS if (ROOT / t).exists())]},
            limit=200,
            reserve=90,
            needs=["build"],
            environment=strict,
        ),
        Stage("roofs", {"": [*module, "benchmarks.roof", "--device", "cuda"]}, 40, reserve=20),
        Stage(
            "benchmarks",
            {"": [*bench, "0.3", "--compiled", "no"]},
            limit=150,
            reserve=70,
            needs=["build"],
            environment=strict,
        ),
        Stage(
            "sanitizers",
            {tool: sanitizer(machine, tool, python) for tool in SANITIZERS},
            limit=100,
            reserve=40,
            needs=["build"],
            # Each tensor gets an allocation of its own, so that what is beyond its end is noticed.
            environment={**strict, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            missing="" if "compute-sanitizer" in machine.tools else "there is no compute-sanitizer",
        ),
        Stage(
            "compiled",
            {"": [*bench, "0.2", "--compiled", "only", "--limit", "30"]},
            limit=150,
            reserve=30,
            needs=["build"],
            environment=strict,
        ),
        Stage(
            "profile",
            {"": [*module, "benchmarks.profiling", "--results", str(machine.results)]},
            limit=60,
            reserve=25,
            needs=["build"],
            missing="" if "ncu" in machine.tools else "there is no ncu",
        ),
        Stage(
            "report",
            {"": [*module, "benchmarks.report", str(machine.results)]},
            limit=20,
            reserve=10,
            needs=["build"],
        ),
    ]


def sanitizer(machine: Machine, tool: str, python: str = sys.executable) -> list[str]:
    """The command that runs small cases of every op under a tool of compute-sanitizer."""
    command = [machine.tools.get("compute-sanitizer", "compute-sanitizer"), "--tool", tool]
    command += ["--error-exitcode", "9", "--print-limit", "20"]
    return [*command, python, "-m", "benchmarks.small_cases"]


def publisher(out: Path | None, results: Path):
    """Copies the summary into `out`, with archives of the logs and of the results."""

    def publish(folder: Path) -> None:
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "summary.md"):
            if (folder / name).exists():
                shutil.copy(folder / name, out / name)
        for name, of in (("logs", folder), ("results", results)):
            if not of.is_dir():
                continue
            partial = out / f"{name}.partial"
            with tarfile.open(partial, "w:gz") as archive:
                archive.add(of, arcname=of.name)
            partial.replace(out / f"{name}.tar.gz")

    return publish


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see the top of the file for what it returns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds in all")
    parser.add_argument("--only", default="", metavar="A,B", help="only these stages")
    options = parser.parse_args(arguments)
    machine = find_machine()
    if isinstance(machine, str):
        print(f"gpu-check: {machine}. Nothing was checked.", file=sys.stderr)
        return 2
    chosen = stages(machine)
    only = [name for name in options.only.split(",") if name]
    unknown = set(only) - {stage.name for stage in chosen}
    if unknown:
        parser.error(f"--only: unknown stage {', '.join(sorted(unknown))}")
    if only:
        # What an earlier run built is there.
        chosen = [stage for stage in chosen if stage.name in only]
        chosen = [
            Stage(**{**vars(s), "needs": [name for name in s.needs if name in only]})
            for s in chosen
        ]
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    title = f"gpu-check: {machine.name}, torch {machine.torch}"
    publish = publisher(out, machine.results)
    shutil.rmtree(FOLDER, ignore_errors=True)
    status = Runner(FOLDER, options.deadline, title, publish).run(chosen)
    # The end of the output is what a machine elsewhere shows.
    for name in ("report.log", "summary.md"):
        if (FOLDER / name).exists():
            print((FOLDER / name).read_text())
    print(f"Logs: {FOLDER}. Results: {machine.results}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
