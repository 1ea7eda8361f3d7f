"""The main function of programs that take a config file and a workdir: `train.py`, `eval.py`, ablations."""

from __future__ import annotations

import argparse
import logging as standard_logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from adregnet_jax.config import Config
from adregnet_jax.errors import OneLineParser, UserError
from adregnet_jax.launch.config_file import load_config, override
from adregnet_jax.launch.devices import find_device, memory_errors_as_user_errors
from adregnet_jax.launch.process import (
    check_jax_version,
    join_processes,
    keep_freed_memory,
    make_deterministic,
    use_compilation_cache,
    use_every_core,
)

MEMORY_ADVICE = (
    "run.memory=auto finds settings with which a training step fits; model.dtype=bfloat16, model.remat=True"
    " and smaller volumes take less"
)


def main(
    run: Callable[[Config, Path], object],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    several_processes: bool = False,
) -> int:
    """Calls `run(config, workdir)` according to the command line.

    `several_processes` adds options that join processes into one run.

    Returns:
        The exit status: 0, or 2 after a `UserError`, which is printed to stderr as one line.
    """
    # Orbax and its coroutines report a failed save in a hundred lines; we print one.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    try:
        config, workdir, processes = parse(
            description, sys.argv[1:] if argv is None else argv, several_processes=several_processes
        )
        check_jax_version()
        keep_freed_memory()
        use_compilation_cache()
        if processes is None:
            parts = config.optimiser.batch_size // max(1, config.optimiser.accumulate)
            use_every_core(parts * config.run.space_devices)
        else:
            join_processes(**processes)
        find_device()  # for its messages
        with memory_errors_as_user_errors(MEMORY_ADVICE):
            run(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(
    description: str | None, argv: Sequence[str], *, several_processes: bool = False
) -> tuple[Config, Path, dict[str, Any] | None]:
    """The config with overrides, the workdir, and the arguments of `join_processes` for several processes."""
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
