"""`benchmarks.run --base REV`: the working tree against another revision of fastgen.

REV is built from `git archive`, out of tree. One process times it, another the working tree; they
take turns round by round, so that what disturbs the machine disturbs both alike, and the ratio is
taken within each round. Both run the working tree's cases.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.case import Case, Setting

ROOT = Path(__file__).parents[1]
#: Built revisions, one folder a commit; `make clean` removes them.
BUILDS = ROOT / "build" / "base"
#: Seconds of timed calls a turn: long enough that changing places costs little.
TURN = 0.02
LEAST_ROUNDS = 7

COLUMNS = ("base", "op", "size", "mode", "threads", "isa", "base_ms", "now_ms")
COLUMNS += ("ratio", "p20_ratio", "p80_ratio", "rounds", "note")


class CompareError(Exception):
    """A comparison that cannot start; the message says why."""


def resolve(revision: str) -> str:
    """The commit that a revision names.

    Raises:
        CompareError: this is no git checkout, or it has no such revision.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    if shutil.which("git") is None:
        raise CompareError("--base needs git, which is not installed")
    if git("rev-parse", "--git-dir").returncode != 0:
        raise CompareError(f"--base needs a git checkout; {ROOT} is none")
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode != 0:
        raise CompareError(f"--base {revision!r}: there is no such revision in {ROOT}")
    return found.stdout.strip()


def build(commit: str) -> Path:
    """Builds fastgen of a commit, once; returns the folder that holds the package.

    Raises:
        CompareError: the build fails.
    """
    target = BUILDS / commit[:12]
    if target.exists():
        return target
    print(f"building {commit[:12]}: minutes the first time", flush=True)
    BUILDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILDS, prefix="partial-") as name:
        folder = Path(name)
        archive = folder / "source.tar"
        subprocess.run(["git", "archive", f"--output={archive}", commit], cwd=ROOT, check=True)
        shutil.unpack_archive(archive, folder / "source")
        command = [sys.executable, "setup.py", "-q", "build"]
        command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
        done = subprocess.run(
            command, cwd=folder / "source", capture_output=True, text=True, env=_environment()
        )
        if done.returncode != 0:
            raise CompareError(
                f"building {commit} fails:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        (folder / "lib").rename(target)
    return target


def _environment() -> dict[str, str]:
    return {**os.environ, "FASTGEN_CUDA": "0", "FASTGEN_SANITIZE": "0"}


class Side:
    """A process that times the fastgen of one folder."""

    def __init__(self, name: str, tree: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        path = os.pathsep.join(map(str, dict.fromkeys((tree, ROOT))))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={
                **_environment(),
                **environment,
                "PYTHONPATH": path,
                "FASTGEN_WORKER_TREE": str(tree),
            },
        )
        self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            CompareError: the process has ended; what it said is on standard error.
        """
        assert self.process.stdin is not None
        # A process that is gone is noticed where its answer is missing.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise CompareError(f"the process of {self.name} ended; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, which stops where its requests do."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True)
class Ratio:
    """Seconds of both sides, and base / now of the rounds: 2 is twice as fast as the base.

    `note` says why there are no figures.
    """

    base: float = float("nan")
    now: float = float("nan")
    ratios: tuple[float, ...] = ()
    note: str = ""

    @property
    def spread(self) -> tuple[float, float, float]:
        """20 % quantile, median and 80 % quantile of the ratios."""
        low, *_, high = quantiles(self.ratios, n=5, method="inclusive")
        return low, median(self.ratios), high


def alternate(base: Side, now: Side, budget: float, **case: Any) -> Ratio:
    """Times one case on both sides in turn, for about `budget` seconds each."""
    opened = {side: side.ask("open", **case) for side in (base, now)}
    for side, answer in opened.items():
        if "missing" in answer:
            return Ratio(note=f"not in {side.name}: {answer['missing']}")
    slower = max(answer["seconds"] for answer in opened.values())
    calls = max(1, min(1000, int(TURN / slower)))
    times: dict[Side, list[float]] = {base: [], now: []}
    start = time.perf_counter()
    while len(times[now]) < LEAST_ROUNDS or time.perf_counter() - start < 2 * budget:
        order = (base, now) if len(times[now]) % 2 == 0 else (now, base)
        for side in order:
            times[side].append(side.ask("time", calls=calls)["seconds"])
    ratios = tuple(b / n for b, n in zip(times[base], times[now], strict=True))
    return Ratio(median(times[base]), median(times[now]), ratios)


def compared(
    base: Side,
    now: Side,
    cases: Mapping[str, Sequence[Case]],
    settings: Sequence[Setting],
    budget: float,
) -> Iterator[dict[str, Any]]:
    """A row for every case, mode and setting, printed as it comes."""
    todo = [
        (case, mode, setting)
        for of_op in cases.values()
        for case in of_op
        for setting in settings
        for mode in case.modes
    ]
    for i, (case, mode, setting) in enumerate(todo, 1):
        where = {"op": case.op, "size": case.size, "mode": mode}
        where |= {"threads": setting.threads, "isa": setting.isa}
        print(f"[{i}/{len(todo)}] {case.op} {case.size}, {mode}, {setting}", flush=True)
        result = alternate(base, now, budget, **where)
        if result.note:
            print(f"    {result.note}", flush=True)
            yield {"base": base.name, **where, "note": result.note}
            continue
        low, middle, high = result.spread
        base_ms, now_ms = result.base * 1e3, result.now * 1e3
        spread = f"{middle:.3f}x [{low:.3f} .. {high:.3f}]"
        print(f"    base {base_ms:.4g} ms, now {now_ms:.4g} ms: {spread}", flush=True)
        figures = {"base_ms": base_ms, "now_ms": now_ms, "ratio": middle}
        figures |= {"p20_ratio": low, "p80_ratio": high}
        texts = {name: f"{value:.4f}" for name, value in figures.items()}
        yield {"base": base.name, **where, **texts, "rounds": len(result.ratios)}


def main(
    revision: str,
    cases: Mapping[str, Sequence[Case]],
    settings: Sequence[Setting],
    budget: float,
    out: Path | None,
    environment: Mapping[str, str],
) -> int:
    """Compares, prints and writes a CSV (build/compare.csv, or compare.csv in `out`).

    Both processes run with the variables of `environment` beside those of this one.

    Returns:
        0; 2 where the comparison cannot start or a side ends early; 130 where interrupted.
    """
    path = (out or ROOT / "build") / "compare.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    sides: list[Side] = []
    try:
        commit = resolve(revision)
        tree = build(commit)
        sides += [Side(commit[:12], tree, environment)]
        sides += [Side("the working tree", ROOT, environment)]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS)
            writer.writeheader()
            for row in compared(*sides, cases, settings, budget):
                writer.writerow(row)
                file.flush()
    except CompareError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished cases are in {path}")
        return 130
    finally:
        for side in sides:
            side.close()
    print(
        f"ratio = time of {commit[:12]} / time now; above 1 the working tree is faster\n-> {path}"
    )
    return 0
