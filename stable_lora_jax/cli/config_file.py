"""``stable-lora train --config run.yaml``: the options of the command line in a file, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stable_lora_jax.finetune import RunConfig, option_places

_OF_THE_COMMAND = ("config", "print_config")


def with_file(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of `train` with those of its --config file before them, so that they override the file's.

    Raises:
      ValueError: the file is not a mapping of options to plain values, or is named twice.
      FileNotFoundError: there is no such file.
    """
    if not arguments or arguments[0] != "train":
        return list(arguments)
    files, rest, given = [], [], iter(arguments)
    for argument in given:
        if argument == "--config":
            files.append(next(given, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if len(files) > 1:
        raise ValueError(f"--config is given {len(files)} times. Give one file; options after it override its own.")
    return rest if not files else [rest[0], *_arguments(Path(files[0])), *rest[1:]]


def to_yaml(config: RunConfig) -> str:
    """Returns every option of a configuration by its name, as --config reads it."""
    options = {name: getattr(getattr(config, section), at) for name, (section, at) in option_places().items()}
    plain = {name: _plain(value) for name, value in options.items() if name not in _OF_THE_COMMAND}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _arguments(file: Path) -> list[str]:
    """Returns the options in a file as arguments."""
    known, found = option_places().keys() - set(_OF_THE_COMMAND), _read(file)
    if unknown := [str(name) for name in found if name not in known]:
        raise ValueError(f"{file}: unknown options {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    arguments = []
    for name, value in found.items():
        option = str(name).replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list) and all(isinstance(each, str) for each in value):
            arguments += [f"--{option}", *value]
        elif value is None or isinstance(value, str | int | float):
            arguments.append(f"--{option}={value}")
        else:
            raise ValueError(f"{file}: {name} is {value!r}. It must be a text, a number, true, false, null or a list.")
    return arguments


def _read(file: Path) -> dict[Any, Any]:
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}. Correct it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} contains {type(found).__name__}, not options. Write one per line, e.g. rank: 8.")
    return found


class _Loader(yaml.SafeLoader):
    """Refuses an option that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := {str(name) for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} is given more than once")
        return super().construct_mapping(node, deep)
