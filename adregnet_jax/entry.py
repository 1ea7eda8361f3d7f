"""What `train.py` and `eval.py` share: the command line, the config file, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import inspect
import logging as standard_logging
import os
import re
import runpy
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from adregnet_jax import config as settings
from adregnet_jax.config import Config
from adregnet_jax.errors import OneLineParser, UserError


def main(
    run: Callable[[Config, Path], object],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    several_processes: bool = False,
) -> int:
    """Calls `run(config, workdir)` with what the command line says.

    With `several_processes`, there are options by which processes join into one run.

    Returns:
        The exit status: 0, or 2 after a `UserError`, of which one line goes to stderr.
    """
    # Of a failed save Orbax and its coroutines tell in a hundred lines, we in one.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    try:
        config, workdir, processes = parse(
            description, sys.argv[1:] if argv is None else argv, several_processes=several_processes
        )
        keep_freed_memory()
        use_compilation_cache()
        if processes is None:
            parts = config.optimiser.batch_size // max(1, config.optimiser.accumulate)
            use_every_core(parts * config.run.space_devices)
        else:
            join_processes(**processes)
        run(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(
    description: str | None, argv: Sequence[str], *, several_processes: bool = False
) -> tuple[Config, Path, dict[str, Any] | None]:
    """The config, with the overrides of the command line, the working directory, and what `join_processes`
    is told, if the run has several processes."""
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        epilog="Any field of the config can be set: --config.optimiser.learning_rate=3e-4",
    )
    parser.add_argument("--config", metavar="FILE", help="Python file whose get_config() returns a Config")
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the run: checkpoints, metrics, evaluation"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="on GPU: the same bits every time, more slowly"
    )
    if several_processes:
        parser.add_argument(
            "--distributed", action="store_true", help="started by SLURM or Open MPI: join their processes"
        )
        parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; without SLURM and MPI")
        parser.add_argument("--processes", metavar="N", help="how many there are")
        parser.add_argument("--process", metavar="I", help="which of them this is, from 0")
    arguments, rest = parser.parse_known_args(argv)
    for option in ("config", "workdir"):
        if not getattr(arguments, option):
            raise UserError(
                f"--{option} is missing: for instance --config configs/phantom.py --workdir runs/phantom"
            )
    processes = _process_options(arguments) if several_processes else None
    if arguments.deterministic:
        make_deterministic()
    return override(load_config(Path(arguments.config)), rest), Path(arguments.workdir), processes


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
            f"--config {path}: {type(error).__name__}: {_one_line(error)}{_hint(error)}"
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
        raise UserError(_one_line(error)) from error
    if left_over:
        raise UserError(f"{left_over[0]!r} is not understood: write a field as --config.field=value")
    _check_fields(holder.value, "--config")
    return holder.value


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start does not compile again.

    The folder is JAX_COMPILATION_CACHE_DIR, or else adregnet_jax/ in the user's cache folder.
    """
    import jax  # a misspelt field is told of before JAX is loaded

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "adregnet_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def make_deterministic() -> None:
    """Makes XLA leave out kernels of GPUs whose sums come in no fixed order; before JAX is loaded.

    On CPU there are none: the same program gives the same bits.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def use_every_core(parts: int) -> None:
    """On CPU, one device a core up to the parts of a batch: a pair on each core beats one pair on all."""
    import jax

    devices = min(parts, os.cpu_count() or 1)
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def join_processes(**options: Any) -> None:
    """Makes this process one of a run of several, before JAX looks for devices.

    Args:
        options: of `jax.distributed.initialize`; none where SLURM or Open MPI tell them.

    Raises:
        UserError: the others can't be found.
    """
    import jax

    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        advice = "check --coordinator, and that all processes were started"
        if not options:
            advice = "start by srun or mpirun, or give --coordinator, --processes and --process"
        raise UserError(f"the processes can't join ({_one_line(error)}): {advice}") from error


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks: handing them back costs a quarter of a training step.

    XLA on CPU allocates the temporaries of a step anew each time, and each page of them faults. Only the main
    arena can hold blocks of this size, and a thread that has got another one keeps it: call this before JAX
    starts its threads.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)


def _process_options(arguments: argparse.Namespace) -> dict[str, Any] | None:
    given = [arguments.coordinator, arguments.processes, arguments.process]
    if given == [None, None, None]:
        return {} if arguments.distributed else None
    example = "for instance --coordinator node1:1234 --processes 2 --process 0"
    if arguments.distributed or None in given:
        raise UserError(
            f"--coordinator, --processes and --process go together, without --distributed: {example}"
        )
    if not (arguments.processes + arguments.process).isdigit() or ":" not in arguments.coordinator:
        raise UserError(
            f"--coordinator {arguments.coordinator} --processes {arguments.processes}"
            f" --process {arguments.process}: expected HOST:PORT and two numbers: {example}"
        )
    processes, process = int(arguments.processes), int(arguments.process)
    if process >= processes:
        raise UserError(
            f"--process is {process}: of {processes} processes, it is one from 0 to {processes - 1}"
        )
    return {"coordinator_address": arguments.coordinator, "num_processes": processes, "process_id": process}


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


def _check_fields(node, path: str) -> None:
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


def _fits(value, kind) -> bool:
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


def _fields(node) -> list[str]:
    return [field.name for field in dataclasses.fields(node)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
