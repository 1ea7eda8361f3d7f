"""Config files, and overrides of their fields from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import runpy
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from adregnet_jax import config as settings
from adregnet_jax.config import Config
from adregnet_jax.errors import UserError, one_line


def load_config(path: Path) -> Config:
    """What `get_config()` of the file `path` returns.

    Raises:
        UserError: if the file can't be run, returns something else, or sets a field that doesn't exist.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: there is no such file")
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except KeyError as error:
        if error.args != ("get_config",):
            raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error
        raise UserError(f"--config {path} has no function get_config(): it must return a Config") from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--config {path}: {type(error).__name__}: {one_line(error)}{_hint(error)}"
        ) from error
    if not isinstance(config, Config):
        raise UserError(f"--config {path}: get_config() must return a Config, not a {type(config).__name__}")
    _check_fields(config, f"--config {path}: config")
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `--config.field=value` arguments applied, each read as the type of its field."""
    for argument in overrides:
        if argument.startswith("--config.") or argument.startswith("--noconfig."):
            _check_path(config, argument)
        elif argument.startswith("-"):
            raise UserError(
                f"{argument.split('=')[0]} is not an option: --help lists them, --config.<field> sets a field"
            )
    values = flags.FlagValues()
    arguments = ["", *overrides]
    try:
        holder = config_flags.DEFINE_config_dataclass(
            "config", config, flag_values=values, sys_argv=arguments
        )
        left_over = values(arguments)[1:]
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error
    if left_over:
        raise UserError(f"{left_over[0]!r} is not understood: write a field as --config.field=value")
    _check_fields(holder.value, "--config")
    return holder.value


def _check_path(config: Config, argument: str) -> None:
    """Refuses a `--config.a.b=...` that names no field."""
    node = config
    names = argument.split("=")[0].split(".")[1:]
    for depth, name in enumerate(names):
        fields = _fields(node) if dataclasses.is_dataclass(node) else []
        if name not in fields:
            raise UserError(f"--config.{'.'.join(names)}: no field {name}{_did_you_mean(name, fields)}")
        node = getattr(node, name)
        if depth == len(names) - 1 and dataclasses.is_dataclass(node):
            raise UserError(f"--config.{'.'.join(names)} is a group: set one of {', '.join(_fields(node))}")


def _check_fields(node: Any, path: str) -> None:
    """Refuses values of another type, and attributes made by mistake: `config.model.chanels = ...`."""
    types = typing.get_type_hints(type(node))
    for name, value in vars(node).items():
        if name not in types:
            raise UserError(f"{path} has no field {name}{_did_you_mean(name, _fields(node))}")
        if not _fits(value, types[name]):
            expected = inspect.formatannotation(types[name])
            raise UserError(f"{path}.{name} must be {expected}, not {value!r}")
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{path}.{name}")


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        *kinds, last = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        kinds = kinds * len(value) if last is ... else [*kinds, last]
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        kind = (float, int)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _hint(error: BaseException) -> str:
    """For `ModelConfig(chanels=...)`: the field that was probably meant."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = getattr(settings, found[1], None) if found else None
    return _did_you_mean(found[2], _fields(kind)) if found and dataclasses.is_dataclass(kind) else ""


def _did_you_mean(name: str, fields: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, fields, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(fields)}" if fields else ""


def _fields(node: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(node)]
