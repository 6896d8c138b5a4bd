"""Options of a recipe: from the command line and YAML to a config dataclass and back."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fastgen.training.errors import RunError
from fastgen.training.ranges import check_ranges, describe, field_types
from fastgen.training.tasks import RECIPES, Recipe

_KEY = re.compile(r'Parser key "([\w.]+)"')


@dataclasses.dataclass
class TrainOptions:
    """What `fastgen train` was asked for; `run_dir` is None for a new name."""

    recipe: str
    config: Any
    run_dir: Path | None


def find_recipe(name: object) -> Recipe:
    """The recipe of that name.

    Raises:
        RunError: unknown; the message lists those there are.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise RunError(f"unknown recipe {name!r}; known: {', '.join(sorted(RECIPES))}")
    return RECIPES[name]


def parse_train_options(recipe: str, arguments: Sequence[str]) -> TrainOptions:
    """Parse the arguments after the recipe's name; `--some-name` and `--some_name` are one option.

    Later sources win: defaults, the data set's preset, the file of `--config`, other arguments.

    Raises:
        RunError: an unknown option, or a value of the wrong kind or out of range.
    """
    parser = _parser(recipe)
    arguments = [_underscored(argument) for argument in arguments]
    data = _parse(parser, recipe, arguments).data
    parser.set_defaults(find_recipe(recipe).presets.get(data, {}))
    parsed = _parse(parser, recipe, arguments)
    run_dir = None if parsed.run_dir is None else Path(parsed.run_dir)
    return TrainOptions(recipe, _instantiate(parser, recipe, parsed), run_dir)


def config_to_dict(recipe: str, config: Any) -> dict[str, Any]:
    """The resolved options as plain values: what config.yaml holds."""
    plain = yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(config))))
    return {"recipe": recipe, **plain}


def config_from_dict(values: dict[str, Any]) -> tuple[str, Any]:
    """The inverse of `config_to_dict`: (recipe, config).

    Raises:
        RunError: an unknown recipe or option, or a value of the wrong kind or out of range.
    """
    recipe = values.get("recipe")
    find_recipe(recipe)
    assert isinstance(recipe, str)
    parser = _parser(recipe)
    try:
        parsed = parser.parse_object(values)
    except (ArgumentError, TypeError, KeyError) as error:
        raise _refusal(recipe, error) from error
    return recipe, _instantiate(parser, recipe, parsed)


def train_help(recipe: str) -> str:
    """The option list of a recipe."""
    return _parser(recipe).format_help()


def _parser(recipe: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"fastgen train {recipe}", exit_on_error=False, add_help=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of options, such as RUN/config.yaml"
    )
    # the file says of which recipe it is; another recipe's file is refused by the type
    parser.add_argument("--recipe", type=Literal[(recipe,)], default=recipe, help=argparse.SUPPRESS)
    parser.add_argument("--run_dir", type=str, help="folder of the run, new or empty")
    parser.add_class_arguments(find_recipe(recipe).config, nested_key=None)
    return parser


def _parse(parser: ArgumentParser, recipe: str, arguments: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(arguments)
    except (ArgumentError, argparse.ArgumentError, TypeError, KeyError, OSError) as error:
        raise _refusal(recipe, error) from error


def _instantiate(parser: ArgumentParser, recipe: str, parsed: Namespace) -> Any:
    kind = find_recipe(recipe).config
    try:
        # before the parts are made: they would not know their names in the whole
        check_ranges(kind, vars(parsed))
        built = parser.instantiate(parsed)
        return kind(**{name: built[name] for name in field_types(kind)})
    except (ValueError, TypeError) as error:
        raise _refusal(recipe, error) from error


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _refusal(recipe: str, error: Exception) -> RunError:
    """One line; where the parser names an option of the recipe, what it must be and what came."""
    text = " ".join(str(error).split())
    found = _KEY.search(text)
    hint = None if found is None else _option_type(find_recipe(recipe).config, found[1])
    _, came, value = text.rpartition("value:")
    if found is not None and hint is not None and came:
        text = f"{found[1]} must be {describe(hint)}, got {value.strip()!r}"
    return RunError(f"{text}; see fastgen train {recipe} --help")


def _option_type(kind: type, name: str) -> Any:
    """The type of the option `name`, as "engine.seed"; None where there is none of that name."""
    found: Any = kind
    for part in name.split("."):
        found = field_types(found).get(part) if isinstance(found, type) else None
    return found
