"""Recipes: YAML files that hold flags of ``losia-pro finetune``, and ``losia-pro recipes``, which lists them.

A key is a flag's name without its dashes, and a value what would follow the flag. Two keys are no flags:
``about``, a line for the list, and ``tasks``, what ``losia-pro evaluate`` would judge the tuned model by.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from .. import data, flags
from ..errors import CliError
from ..values import file_path

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
OF_A_RUN = {"help", "recipe", "output", "overwrite", "resume"}  # what no recipe can decide

MODELS = """\
models of the paper:  meta-llama/Llama-2-7b-hf, meta-llama/Llama-2-13b-hf, google/gemma-2b
of these sizes:       meta-llama/Llama-3.1-8B, Qwen/Qwen3-8B-Base, Qwen/Qwen3-14B-Base, Qwen/Qwen3-1.7B-Base"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME|FILE", help="show this one, to read or to change a copy"
    )


def run(args: argparse.Namespace) -> int:
    if args.name is not None:
        path = find(args.name)
        read(str(path))
        sys.stdout.write(path.read_text())
        return 0
    for name in names():
        recipe = read(name)
        print(f"{name:<16}{recipe['about']} -> {','.join(recipe['tasks'])}")
    print(f"\n{MODELS}\n\nlosia-pro finetune --recipe NAME --model PATH|ID")
    return 0


def names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe's name, or the one at a path that ends in .yaml or .yml.

    Raises:
        CliError: there is none.
    """
    if Path(name).suffix in SUFFIXES:
        path = file_path(name)
        if not path.is_file():
            raise CliError(f"recipe {name}: no such file")
        return path
    if name not in names():
        raise CliError(
            f"recipe {name}: none of {', '.join(names())}, and not a file that ends in .yaml"
        )
    return FOLDER / f"{name}.yaml"


def expand(given: dict[str, Any]) -> dict[str, Any]:
    """Flags as they were given, with those of their recipe where they say nothing.

    Raises:
        CliError: a recipe that cannot be read, or that holds what is no flag.
    """
    if "recipe" not in given:
        return given
    recipe = read(given["recipe"])
    del recipe["about"]
    if "steps" in given or "epochs" in given:  # one replaces the other
        recipe.pop("steps", None)
        recipe.pop("epochs", None)
    if data.is_file(given.get("data", "")):  # the recipe's data has them
        recipe.pop("subset", None)
        recipe.pop("split", None)
    if "lr" in given and "lr" in recipe:
        given = {**given, "lr": {**recipe["lr"], **given["lr"]}}
    return {**recipe, **given}


def read(name: str) -> dict[str, Any]:
    """The values of a recipe's flags, by the names that the parser gives them, and ``about`` and ``tasks``.

    Raises:
        CliError: with the recipe, the key and what would do.
    """
    path = find(name)
    try:
        import yaml
    except ImportError as error:
        raise CliError("a recipe needs the package pyyaml: pip install pyyaml") from error

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CliError(f"recipe {name}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise CliError(
            f"recipe {name}: {type(content).__name__} where lines 'flag: value' are expected"
        )
    about, tasks = content.pop("about", ""), content.pop("tasks", [])
    if not isinstance(about, str):
        raise CliError(f"recipe {name}: about must be one line of text, got {about!r}")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise CliError(f"recipe {name}: tasks must be a list of names, got {tasks!r}")
    parser = _Parser(name)
    values = vars(parser.parse_args([parser.argument(k, v) for k, v in content.items()]))
    return {**values, "about": about, "tasks": tasks}


class _Parser(argparse.ArgumentParser):
    """Reads a recipe's values as finetune reads its flags', and says which recipe is wrong."""

    def __init__(self, recipe: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.recipe = recipe
        flags.add_arguments(self)

    def error(self, message: str) -> NoReturn:
        raise CliError(f"recipe {self.recipe}: {message}")

    def argument(self, key: Any, value: Any) -> str:
        """``--key=value``, or ``--key`` alone where it is a switch."""
        known = {a.option_strings[0][2:]: a for a in self._actions if a.dest not in OF_A_RUN}
        if key not in known:
            self.error(f"unknown key {key!r}; the keys are about, tasks, {', '.join(known)}")
        action = known[key]
        if action.nargs == 0:
            if value is not True:
                self.error(f"{key} must be true, or left out, got {value!r}")
            return f"--{key}"
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self.error(
                f"{key} must be text or a number, as it would follow the flag, got {value!r}"
            )
        return f"--{key}={value}"
