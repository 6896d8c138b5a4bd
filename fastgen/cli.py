"""The command line: fastgen train | sample | eval | download | bench | info."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastgen.memory import keep_freed_memory

_EXTRAS = {
    "accelerate": "accelerate",
    "jsonargparse": "jsonargparse",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
    "yaml": "pyyaml",
    "PIL": "pillow",
}

_USAGE = """\
usage: fastgen COMMAND ...

  train RECIPE [--config FILE] [--data NAME] [--data-root DIR] [--run-dir DIR]
        [--any.option VALUE]      train in a new run folder
  train --resume RUN [--data-root DIR] [--accept-changes]
                                  go on with a run; also where its options or data changed
  sample RUN [--num N] [--seed S] [--label L] [--temperature T] [--out PNG]
  eval RUN [--features RUN|inception] [--evaluation.OPTION VALUE]
                                  measures on held-out data; writes RUN/eval.json
  download DATA [--data-root DIR] fetch the files of a data set, with their checksums
  bench [OP]                      time an op against others (in a source checkout)
  info                            versions, what was built, each op's backends

fastgen train RECIPE --help lists a recipe's options; FASTGEN_DATA=DIR stands for --data-root."""


class CommandError(Exception):
    """A command line that cannot be followed; the message is one line that says what to do."""


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are `CommandError`; no option goes by a part of its name."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if status:
            raise CommandError((message or "").strip())
        super().exit(status, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        exit status: 0, 1 (the training failed), 2 (a bad request), 130 (interrupted) or 143
        (stopped by SIGTERM, with a checkpoint).
    """
    arguments = command_line(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    return run_command(_dispatch, arguments)


def command_line(arguments: Sequence[str] | None) -> list[str]:
    """What to run; None for the arguments of the process, whose memory is then the command's."""
    if arguments is not None:
        return list(arguments)
    keep_freed_memory()
    return sys.argv[1:]


def run_command(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command; an error that the user can put right becomes one line and an exit status."""
    try:
        return command(arguments)
    except CommandError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; a run goes on with fastgen train --resume RUN", 130)


def _dispatch(arguments: Sequence[str]) -> int:
    command = arguments[0]
    if command not in _COMMANDS:
        raise CommandError(f"unknown command {command!r}; known: {', '.join(_COMMANDS)}")
    return _COMMANDS[command](arguments[1:])


def _fail(error: object, status: int) -> int:
    print(f"fastgen: error: {error}", file=sys.stderr)
    return status


def needs_training(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Wrap a command that needs the extras: they are checked, and its errors become one line."""

    def checked(arguments: Sequence[str]) -> int:
        missing = [
            pip for module, pip in _EXTRAS.items() if importlib.util.find_spec(module) is None
        ]
        if missing:
            raise CommandError(
                f"{', '.join(missing)} not installed; run: pip install 'fastgen[train]'"
            )
        from fastgen.data import DataError
        from fastgen.training.errors import (
            NonFiniteLossError,
            RunError,
            TrainingStopped,
            WriteError,
        )
        from fastgen.training.processes import leave_process_group, tells

        statuses: dict[type, int] = {
            NonFiniteLossError: 1,
            WriteError: 1,
            TrainingStopped: 128 + signal.SIGTERM,
        }
        try:
            status = command(arguments)
        except (RunError, DataError) as error:
            status = statuses.get(type(error), 2)
            if tells(error):
                _fail(error, status)
        # the error is gone by now, and with it the networks that its traceback held
        leave_process_group()
        return status

    return checked


@needs_training
def _train(arguments: Sequence[str]) -> int:
    from accelerate import PartialState

    from fastgen.training.options import parse_train_options, train_help
    from fastgen.training.runs import resume_run, start_run

    resume = CommandParser("fastgen train", add_help=False)
    resume.add_argument("--resume", type=Path)
    if any(a == "--resume" or a.startswith("--resume=") for a in arguments):
        resume.add_argument("recipe", nargs="?")
        resume.add_argument("--data-root", "--data_root")
        resume.add_argument("--accept-changes", "--accept_changes", action="store_true")
        options = resume.parse_args(arguments)
        run = resume_run(
            options.resume,
            options.data_root,
            options.recipe,
            accept_changes=options.accept_changes,
        )
    else:
        recipe, rest = _split_recipe(arguments)
        if recipe is None or "-h" in rest or "--help" in rest:
            print(_USAGE if recipe is None else train_help(recipe))
            return 0
        wanted = parse_train_options(recipe, rest)
        run = start_run(recipe, wanted.config, wanted.run_dir)
    if PartialState().is_main_process:
        print(f"done: {run.path}")
    return 0


def _split_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(recipe, other arguments); None when only help is wanted."""
    from fastgen.training.options import find_recipe
    from fastgen.training.tasks import RECIPES

    if arguments and not arguments[0].startswith("-"):
        find_recipe(arguments[0])
        return arguments[0], list(arguments[1:])
    if "-h" in arguments or "--help" in arguments:
        return None, []
    raise CommandError(f"fastgen train needs a recipe first; known: {', '.join(sorted(RECIPES))}")


@needs_training
def _sample(arguments: Sequence[str]) -> int:
    from fastgen.training.checkpoint import write_atomic
    from fastgen.training.images import made_by_fastgen, png_bytes
    from fastgen.training.runs import sample_run

    parser = CommandParser(
        "fastgen sample", description="draw images from a trained run as one PNG grid"
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--num", type=int, default=64, help="images to draw (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class to draw; by default all in turn")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--data-root", help="where the data is, if it moved")
    parser.add_argument("--out", type=Path, help="PNG file (RUN/samples/sample-seed<S>.png)")
    options = parser.parse_args(arguments)
    if options.out is not None:
        if options.out.suffix.lower() != ".png":
            raise CommandError(f"--out must be the name of a .png file, got {options.out}")
        if os.path.lexists(options.out) and not made_by_fastgen(options.out):
            raise CommandError(
                f"{options.out} exists and is no picture of fastgen's; give another with --out"
            )
    images = sample_run(
        options.run,
        options.num,
        seed=options.seed,
        label=options.label,
        temperature=options.temperature,
        data_root=options.data_root,
    )
    out = options.out or options.run / "samples" / f"sample-seed{options.seed}.png"
    try:
        if options.out is None:
            out.parent.mkdir(exist_ok=True)
        write_atomic(out, png_bytes(images))
    except OSError as error:
        raise CommandError(
            f"cannot write {out}: {error.strerror}; give another with --out"
        ) from error
    print(out)
    return 0


@needs_training
def _eval(arguments: Sequence[str]) -> int:
    from fastgen.training.runs import evaluate_run

    parser = CommandParser(
        "fastgen eval", description="measure a trained run on the held-out splits"
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", help="where the data is, if it moved")
    parser.add_argument(
        "--features",
        help="run of recipe classifier, or 'inception' (torchvision's): compare samples with test "
        "images",
    )
    parser.add_argument("--num", type=int, default=10_000, help="samples for that (10000)")
    arguments, overrides = _split_overrides(arguments)
    options = parser.parse_args(arguments)
    measures = evaluate_run(
        options.run,
        options.data_root,
        features=options.features,
        num=options.num,
        overrides=overrides,
    )
    print(f"{'':24}" + "".join(f"{split:>12}" for split in measures))
    for name in dict.fromkeys(name for values in measures.values() for name in values):
        cells = (values.get(name) for values in measures.values())
        print(f"{name:24}" + "".join(f"{'' if c is None else f'{c:.5g}':>12}" for c in cells))
    return 0


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other arguments, those for the recipe as --evaluation.OPTION=VALUE)."""
    others: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--evaluation."):
            others.append(argument)
            continue
        if "=" not in argument:
            value = next(rest, "--")
            if value.startswith("--"):
                raise CommandError(f"argument {argument}: expected one argument")
            argument = f"{argument}={value}"
        overrides.append(argument)
    return others, overrides


def _download(arguments: Sequence[str]) -> int:
    from fastgen.data import DataError, download, resolve_data_root

    parser = CommandParser("fastgen download", description="fetch the files of a data set")
    parser.add_argument("data", help="mnist, fashion-mnist, binarized-mnist or cifar10")
    parser.add_argument("--data-root", help="folder for them (FASTGEN_DATA)")
    options = parser.parse_args(arguments)
    try:
        root = resolve_data_root(options.data_root)
        if root is None:
            raise CommandError("no data folder is set; give --data-root DIR or FASTGEN_DATA=DIR")
        download(options.data, root)
    except DataError as error:
        raise CommandError(str(error)) from error
    return 0


def _bench(arguments: Sequence[str]) -> int:
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise CommandError(
            "the benchmarks are in the source checkout alone; run fastgen bench from there"
        )
    sys.path.insert(0, str(checkout))
    benchmarks = importlib.import_module("benchmarks.run")
    return int(benchmarks.main(list(arguments), CommandParser("fastgen bench")) or 0)


def _info(arguments: Sequence[str]) -> int:
    from fastgen.info import main as print_info

    return print_info(arguments, CommandParser("fastgen info"))


_COMMANDS = {
    "train": _train,
    "sample": _sample,
    "eval": _eval,
    "download": _download,
    "bench": _bench,
    "info": _info,
}


if __name__ == "__main__":
    sys.exit(main())
